import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

from longshort.bench import gpu
from longshort.bench.benchmark import Benchmark
from longshort.bench.record import write_rows
from longshort.bench.summary import QUESTIONS, summarize, write_summary
from longshort.cli.flags import parse

COLUMNS = {"unit": "ms", "rounds": 3, "accelerator": "GPU X", "torch_version": "2.11"}


def planted(
    benchmark: str, x: int, metric: str, medians: dict[str, float], **columns: object
) -> pd.DataFrame:
    rows = [
        {
            "benchmark": benchmark, "setting": " ".join(map(str, columns.values())), "x": x, "provider": name,
            "metric": metric, "p10": 0.5 * median, "p50": median, "p90": 2 * median, **columns, **COLUMNS,
        }
        for name, median in medians.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def attention(x: int, metric: str, global_heads: int, direction: str, **medians: float) -> pd.DataFrame:
    named = {name.replace("_", "-"): value for name, value in medians.items()}
    columns = {"global_heads": global_heads, "window": 128, "pass": direction}
    return planted("attention", x, metric, named, **columns)


def test_the_ratios_of_planted_numbers(tmp_path: Path) -> None:
    tables = [
        attention(16_384, "gflops", 0, "forward", triton=200.0, sdpa=400.0, flex=1.0),
        attention(16_384, "milliseconds", 0, "forward", triton=4.0, triton_statistics=4.5),
        attention(4096, "milliseconds", 1, "forward", triton=1.0, flex=3.0),
        attention(16_384, "milliseconds", 1, "forward-backward", triton=2.0, sdpa=21.0),
        attention(16_384, "milliseconds", 1, "forward", triton=1.0, sdpa=9.0),
    ]
    write_rows(pd.concat(tables), tmp_path / "attention.csv")
    again = attention(16_384, "gflops", 0, "forward", triton=1.0, sdpa=1.0)
    write_rows(again, tmp_path / "package.csv")
    decode = planted("decode", 32_768, "milliseconds", {"ls": 2.0, "mhsa": 5.0}, batch=1)
    write_rows(decode, tmp_path / "decode.csv")
    write_summary(tmp_path)
    text = write_summary(tmp_path).read_text()
    assert text.startswith("# Measured on a GPU\n\nGPU X, torch 2.11. Ratios of medians.")
    sections = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    local, flex, mhsa, decoding, statistics = (part.strip().splitlines() for part in sections.values())
    assert local == ["- 16,384 tokens, 0 128 forward: `triton / sdpa` **50%**"]
    assert flex == [
        "- 4,096 tokens, 1 128 forward: `flex / triton` **3.00**",
        "- 16,384 tokens, 1 128 forward-backward: not measured, flex missing",
        "- 16,384 tokens, 1 128 forward: not measured, flex missing",
    ]
    assert mhsa == ["- 16,384 tokens, 1 128 forward-backward: `sdpa / triton` **10.50**"]
    assert decoding == ["- 32,768 tokens, 1: `mhsa / ls` **2.50**"]
    assert statistics[0] == "- 16,384 tokens, 0 128 forward: `triton-statistics / triton` **112.5%**"
    assert all(line.endswith("not measured, triton-statistics missing") for line in statistics[1:])


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = write_summary(tmp_path).read_text()
    assert "Nothing was measured." in text
    assert text.count("Not measured: there are no rows of benchmark") == 5
    decode = planted("decode", 32_768, "milliseconds", {"ls": 2.0}, batch=1)
    text = summarize(decode)
    assert "- 32,768 tokens, 1: not measured, mhsa missing" in text
    assert (
        "Not measured: there are no rows of benchmark attention, global_heads 0, window 128, x 16384." in text
    )


def commands_of_make() -> list[Benchmark]:
    """The benchmarks of `make gpu-bench`, which need no GPU to be read."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "gpu-attention", "gpu-models"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.findall(r"longshort bench (\w+) (.*)", done.stdout.replace("\\\n", ""))
    return [
        parse(getattr(import_module(f"longshort.bench.{name}"), f"{name.capitalize()}Benchmark"), name, flags)
        for name, flags in ((name, shlex.split(text)) for name, text in found)
    ]


def test_make_measures_what_the_summary_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    benchmarks = commands_of_make()
    assert [benchmark.name for benchmark in benchmarks] == [
        "attention", "attention", "attention", "decode", "prefill", "memory",
    ]  # fmt: skip
    for question in QUESTIONS:
        measured = [
            case
            for benchmark in benchmarks
            if {question.over, question.under} <= set(benchmark.providers)
            for case in benchmark.cases()
            if question.where.items() <= {**case.columns, "x": case.x, "benchmark": benchmark.name}.items()
        ]
        assert measured, question.title


def test_packages_and_gpus_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"matplotlib", "annotated_types"}
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in absent else name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wanted = (
        f"this needs annotated-types, matplotlib: {sys.executable} -m pip install annotated-types matplotlib"
    )
    assert gpu.missing(["test", "attention", "models", "study"]) == wanted
    assert gpu.missing(["test"]) is None
    absent |= {"triton"}
    assert str(gpu.missing(["test"])).startswith("this needs Triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.missing(["test"]) == f"this needs a GPU, and torch {torch.__version__} finds none"

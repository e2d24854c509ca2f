import csv

import pytest

from longshort.bench import machine, memory
from longshort.cli import main

TINY = ["--lengths", "32", "64", "--heads", "4", "--window", "9", "--head-dim", "8", "--repeats", "1"]
BENCHMARKS = ("attention", "kernel", "kernels", "prefill", "decode", "memory", "monitor", "projection")


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(machine, "_MATMUL_SIZE", 16)


def test_table_csv_and_plot(tmp_path, capsys):
    out = tmp_path / "speed.csv"
    arguments = [
        "--providers",
        "blockwise",
        "sdpa",
        "local-attention",
        "--passes",
        "forward-backward",
        "--out",
        str(out),
    ]
    assert main(["bench", "attention", *TINY, *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("torch ")
    assert "64 tokens, 3 heads of window 9, 1 global head, float32, 1 thread" in shown
    assert (
        "local-attention: local-attention has no global heads: choose --global-heads 0 (2 settings)" in shown
    )
    assert str(out) in shown.replace("\n", "")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["x"], row["provider"]) for row in rows if row["metric"] == "speedup"] == [
        ("32", "blockwise"), ("32", "sdpa"), ("64", "blockwise"), ("64", "sdpa"),
    ]  # fmt: skip
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_files_of_the_user_are_kept(fails, tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_text("precious")
    assert "exists; --overwrite" in fails(1, "bench", "attention", *TINY, "--out", mine)
    assert mine.read_text() == "precious"
    assert main(["bench", "attention", *TINY, "--out", str(mine), "--overwrite"]) == 0
    assert mine.read_text() != "precious"


def test_a_missing_folder_is_a_failure(fails, tmp_path):
    message = fails(1, "bench", "attention", *TINY, "--out", tmp_path / "nowhere" / "speed.csv")
    assert "--out: there is no folder" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "0"], "--window must be an integer >= 1, got 0"),
        (["--window"], "--window must name at least one"),
        (["--providers", "warp"], "got 'warp'"),
        (["--global-heads", "5", "--heads", "4"], "--global-heads must be at most --heads (4), got 5"),
        (["--threads", "0"], "--threads must be an integer >= 1, got 0"),
        (["--threads", "some"], "some"),
        (["--out", "speed.txt"], "--out must end in .csv, got 'speed.txt'"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=str,
)
def test_wrong_usage(fails, flags, message):
    assert message in fails(2, "bench", "attention", *flags)


def test_help(capsys):
    for arguments in (["--help"], ["-h"]):
        assert main(["bench", *arguments]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("usage: longshort bench BENCHMARK")
        for benchmark in BENCHMARKS:
            assert f"\n  {benchmark} " in shown
    for benchmark in BENCHMARKS:
        assert main(["bench", benchmark, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: longshort bench {benchmark}")
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("usage: longshort bench BENCHMARK")


def test_an_unknown_benchmark_is_a_usage_error(fails):
    message = fails(2, "bench", "warp")
    assert f"there is no benchmark 'warp'; the benchmarks are {', '.join(BENCHMARKS)}" in message


@pytest.mark.parametrize(
    ("benchmark", "unit"), [("prefill", "tokens/s"), ("decode", "GB/s"), ("memory", "MiB")]
)
def test_inference(monkeypatch, tmp_path, capsys, fails, benchmark, unit):
    monkeypatch.setattr(memory, "_peaks_of_process", lambda *_: memory.Peaks(10, 30, 4, 7, True))
    out = tmp_path / "inference.csv"
    sizes = ["--preset", "tiny", "--lengths", "32", "--threads", "1"]
    flags = [*sizes, "--providers", "ls", "mhsa", "--out", str(out)]
    assert main(["bench", benchmark, *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("torch ")
    assert "32 tokens, batch 1, float32, 1 thread" in shown
    assert unit in shown
    with out.open(newline="") as file:
        assert list(dict.fromkeys(row["provider"] for row in csv.DictReader(file))) == ["ls", "mhsa"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "exists; --overwrite" in fails(1, "bench", benchmark, *flags)


@pytest.mark.parametrize(
    ("benchmark", "flags", "message"),
    [
        ("prefill", ["--rounds", "0"], "--rounds must be an integer >= 1, got 0"),
        ("prefill", ["--max-length", "100"], "the shortest length, 512, got 100"),
        ("decode", ["--tokens", "0"], "--tokens must be an integer >= 1, got 0"),
        ("decode", ["--dtype", "int8"], "--dtype must be among float32, bfloat16, got 'int8'"),
        ("decode", ["--preset", "tiny", "--global-heads", "9"], "--global-heads must be a multiple of the 1"),
        ("memory", ["--max-length", "8192"], "the shortest length, 16384, got 8192"),
        ("memory", ["--rounds", "3"], "--rounds"),
        ("memory", ["--preset", "huge"], "got 'huge'"),
    ],
    ids=str,
)
def test_wrong_usage_of_inference(fails, benchmark, flags, message):
    assert message in fails(2, "bench", benchmark, *flags)


@pytest.mark.parametrize(
    ("benchmark", "flags", "unit"),
    [
        (
            "kernel",
            ["--lengths", "64", "--heads", "4", "--window", "9", "--head-dim", "8", "--layers", "2"],
            "GB/s",
        ),
        ("monitor", ["--lengths", "32", "--batch", "2", "--rounds", "1"], "more than plain"),
        ("projection", ["--tokens", "1", "--rounds", "1"], "GB/s"),
    ],
    ids=["kernel", "monitor", "projection"],
)
def test_parts_of_a_model(tmp_path, capsys, benchmark, flags, unit):
    out = tmp_path / "parts.csv"
    assert main(["bench", benchmark, *flags, "--threads", "1", "--out", str(out)]) == 0
    assert unit in capsys.readouterr().out
    with out.open(newline="") as file:
        assert {row["benchmark"] for row in csv.DictReader(file)} == {benchmark}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("benchmark", ["kernel", "monitor", "projection"])
def test_wrong_usage_of_parts(fails, benchmark):
    assert "--threads must be an integer >= 1, got 0" in fails(2, "bench", benchmark, "--threads", "0")

import subprocess
import sys

import pytest
import torch
from tests.bench.toy import metrics

from longshort.bench import memory, model_benchmark
from longshort.bench.memory import MemoryBenchmark, Peaks, peaks_of
from longshort.bench.record import read_rows
from longshort.bench.sweep import measure
from longshort.model import kv_bytes, preset

SMALL = {"lengths": (4096,), "threads": 1}


@pytest.mark.slow
def test_each_has_a_process_of_its_own(tmp_path):
    out = tmp_path / "memory.csv"
    results = measure(MemoryBenchmark(**SMALL, providers=("ls", "mhsa"), out=out))
    found = metrics(results)
    assert list(found) == [(4096, "ls"), (4096, "mhsa")]
    ls, mhsa = found.values()
    for row, config in ((ls, preset("tiny")), (mhsa, preset("tiny", mhsa=True))):
        assert row["cache_bytes"] == kv_bytes(config, 4096, torch.float32)
        assert row["increment_bytes"] == row["peak_bytes"] - row["peak_before"]
        assert row["increment_bytes"] > row["cache_bytes"]
        ratio = row["increment_bytes"] / mhsa["increment_bytes"]
        assert row["increment_by_mhsa"] == pytest.approx(ratio, rel=1e-3)
        assert "increment_by_gpt2" not in row
    assert read_rows(out)["p50"].tolist() == results.rows["p50"].tolist()
    assert set(results.rows["rounds"]) == {1}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_ratios_of_increments(monkeypatch):
    peaks = {
        "ls": Peaks(10, 15, 1, 7, True),
        "mhsa": Peaks(10, 30, 4, 7, True),
        "gpt2": Peaks(20, 30, 4, 8, False),
    }
    monkeypatch.setattr(memory, "_peaks_of_process", lambda _benchmark, name, _length: peaks[name])
    results = measure(MemoryBenchmark(**SMALL))
    rows = metrics(results).values()
    assert [row["increment_bytes"] for row in rows] == [5, 20, 10]
    assert [row["increment_by_mhsa"] for row in rows] == [0.25, 1, 0.5]
    assert [row["increment_by_gpt2"] for row in rows] == [0.5, 2, 1]
    assert [row["parameters"] for row in rows] == [7, 7, 8]
    (remark,) = results.notes
    assert remark.provider == "gpt2"
    assert "hides a part of the rise, since /proc/self/clear_refs cannot be written" in remark.text


def test_ratios_need_no_room_for_all_at_once(monkeypatch):
    """Each provider takes most of the memory: they are compared all the same, since none stays."""
    benchmark = MemoryBenchmark(**SMALL)
    largest = max(sum(benchmark.memory_of(benchmark.provider(name), 4096)) for name in benchmark.providers)
    monkeypatch.setattr(model_benchmark, "free_memory", lambda _device: 1.3 * largest)
    monkeypatch.setattr(memory, "_peaks_of_process", lambda *_: Peaks(10, 20, 1, 7, True))
    rows = metrics(measure(benchmark)).values()
    assert len(rows) == 3
    assert all(row["increment_by_mhsa"] == row["increment_by_gpt2"] == 1 for row in rows)


def test_a_peak_that_cannot_be_forgotten_is_noticed(monkeypatch, tmp_path):
    settings = MemoryBenchmark(lengths=(64,), providers=("ls",), threads=1)
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "clear_refs")
    assert peaks_of(settings).forgotten
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)
    assert not peaks_of(settings).forgotten


def test_the_peak_is_that_of_the_prompt_alone():
    """A higher peak before does not hide it, where the system forgets peaks."""
    if sys.platform != "linux":
        pytest.skip("only Linux forgets peaks")
    code = """if True:
        import torch
        from longshort.bench.memory import MemoryBenchmark, peaks_of

        torch.ones(2**26)  # 256 MiB
        found = peaks_of(MemoryBenchmark(lengths=(8192,), providers=("gpt2",), threads=1))
        assert not found.forgotten or found.after - found.before > found.cache, found
    """
    subprocess.run([sys.executable, "-c", code], check=True)  # of its own: free memory here would hide it too


def test_a_process_that_fails_is_reported(monkeypatch):
    settings = MemoryBenchmark(**SMALL, providers=("ls", "mhsa"))
    code = "import os, sys; 'mhsa' in sys.argv[-1] and sys.exit('out of luck'); os.kill(os.getpid(), 9)"

    def run(command, **options):
        return real([command[0], "-c", code, command[-1]], **options)

    real = memory.subprocess.run
    monkeypatch.setattr(memory.subprocess, "run", run)
    with pytest.raises(
        ValueError, match=r"ended by signal 9: out of memory.*; its process failed: out of luck"
    ):
        measure(settings)


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(memory, "_peaks_of_process", lambda *_: Peaks(1, 2, 1, 1, True))
    shown: list[str] = []
    settings = MemoryBenchmark(lengths=(65_536,), providers=("ls", "mistral"), max_memory_gib=8)
    results = measure(settings, show=shown.append)
    assert set(results.rows["provider"]) == {"ls"}
    assert "  mistral: takes about 20." in shown[-1]

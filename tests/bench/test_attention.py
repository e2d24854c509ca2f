import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.bench.toy import metrics
from torch import nn
from torch.nn import functional as F

from longshort.attention import BACKENDS, attention
from longshort.backends import cpu
from longshort.bench import attention as bench_attention
from longshort.bench import machine
from longshort.bench.attention import PASSES, AttentionBenchmark, layout_of
from longshort.bench.attention_providers import (
    PROVIDERS,
    AttentionInputs,
    Kernel,
    prepare,
)
from longshort.bench.benchmark import UnsuitableError
from longshort.bench.kernel import KernelBenchmark
from longshort.bench.sweep import measure
from longshort.layout import HeadLayout

SMALL = {"lengths": (64,), "heads": 4, "window": (9,), "head_dim": 8, "repeats": 2}
LAYOUTS = [
    HeadLayout.split(4, 1, 9),
    HeadLayout.split(4, 0, 9),
    HeadLayout.split(4, 4, 9),
    HeadLayout.split(4, 0, 200),
    HeadLayout.split(4, 2, 30, num_kv_heads=2),
]


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(machine, "_MATMUL_SIZE", 16)
    monkeypatch.setattr(cpu, "fma_peak", lambda: None)


def inputs(layout, length=64, dtype=torch.float64, max_bytes=2.0**30, *, queries=None, with_gradients=True):
    generator = torch.Generator().manual_seed(0)

    def random(heads, tokens=length):
        made = torch.randn(2, heads, tokens, 8, generator=generator).to(dtype)
        return made.requires_grad_(with_gradients)

    k, v = random(layout.num_kv_heads), random(layout.num_kv_heads)
    return AttentionInputs(layout, random(layout.num_heads, queries or length), k, v, max_bytes)


def assert_right(kernel, given):
    """Output and, where there are any, gradients are those of the layout that the provider claims."""
    results = []
    for run in (kernel.run, lambda q, k, v: attention(q, k, v, kernel.layout, backend="reference")):
        leaves = (given.q, given.k, given.v)
        out = run(*leaves)
        gradients = torch.autograd.grad(out.square().sum(), leaves) if given.q.requires_grad else ()
        results.append((out, *gradients))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize(
    "provider",
    ["cpu", "cpu-statistics", "blockwise", "reference", "sdpa", "sdpa-math", "sdpa-masked"],
)
def test_providers_compute_the_layout_that_they_claim(provider, layout):
    given = inputs(layout, dtype=torch.float32 if provider.startswith("cpu") else torch.float64)
    kernel = prepare(provider, given)
    every_head_global = HeadLayout((None,) * layout.num_heads, layout.num_kv_heads)
    assert kernel.layout == (every_head_global if provider in ("sdpa", "sdpa-math") else layout)
    assert_right(kernel, given)
    if provider != "sdpa-masked":
        last = inputs(layout, dtype=given.q.dtype, queries=1, with_gradients=False)
        assert_right(prepare(provider, last), last)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_flex_computes_the_layout(layout):
    given = inputs(layout, length=300, dtype=torch.float32, with_gradients=False)
    kernel = prepare("flex", given)
    assert kernel.layout == layout
    assert kernel.note is not None
    assert "compilation" in kernel.note
    assert_right(kernel, given)
    with pytest.raises(UnsuitableError, match="no backward pass on a CPU"):
        prepare("flex", inputs(layout, length=300, dtype=torch.float32))


class FakeLocalAttention(nn.Module):
    """What local-attention 1.11 computes with these settings, as its source says."""

    def __init__(self, window_size, *, exact_windowsize, causal, autopad, use_rotary_pos_emb):
        super().__init__()
        assert exact_windowsize and causal and autopad and not use_rotary_pos_emb
        self.window_size = window_size

    def forward(self, q, k, v):
        position = torch.arange(q.shape[2])
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance <= self.window_size)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_local_attention_gets_the_window_of_the_layout(monkeypatch):
    fake = SimpleNamespace(LocalAttention=FakeLocalAttention)
    monkeypatch.setitem(sys.modules, "local_attention", fake)
    given = inputs(HeadLayout.split(4, 0, 9))
    kernel = prepare("local-attention", given)
    assert kernel.layout == given.layout
    assert kernel.note is not None
    assert "9 keys as here, not 10 to 18" in kernel.note
    assert_right(kernel, given)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (HeadLayout.split(4, 1, 9), "--global-heads 0"),
        (HeadLayout.split(4, 4, 9), "--global-heads 0"),
        (HeadLayout.split(4, 0, 1), "one key alone"),
        (HeadLayout.split(4, 0, 9, num_kv_heads=2), "key/value heads"),
        (HeadLayout.split(4, 0, 9), "not installed: pip install local-attention"),
    ],
    ids=str,
)
def test_local_attention_says_what_it_cannot_do(monkeypatch, layout, message):
    monkeypatch.setitem(sys.modules, "local_attention", None)
    with pytest.raises(UnsuitableError, match=message):
        prepare("local-attention", inputs(layout))


@pytest.mark.parametrize("provider", ["reference", "sdpa-masked"])
def test_arrays_beyond_the_memory_are_refused(provider):
    with pytest.raises(UnsuitableError, match=r"64 × 64 take about .* --max-memory-gib allows"):
        prepare(provider, inputs(LAYOUTS[0], max_bytes=100_000))


def test_the_gradients_of_the_reference_need_more_memory():
    scores = 2 * 4 * 64 * 64 * 8
    assert prepare("reference", inputs(LAYOUTS[0], max_bytes=5 * scores, with_gradients=False))
    with pytest.raises(UnsuitableError, match="GiB"):
        prepare("reference", inputs(LAYOUTS[0], max_bytes=5 * scores))


def test_metrics():
    benchmark = AttentionBenchmark(
        **{**SMALL, "lengths": (64, 32, 64), "repeats": 3}, providers=("sdpa", "blockwise"),
        global_heads=(1, 0), batch=2, threads=(1, 2), dtypes=("float32", "bfloat16"),
    )  # fmt: skip
    shown: list[str] = []
    results = measure(benchmark, show=shown.append)
    assert not results.left_out
    keys = ["x", "global_heads", "dtype", "threads", "pass", "provider"]
    measured = results.rows.pivot(index=keys, columns="metric", values=["p10", "p50", "p90"])
    assert len(measured) == 2 * 2 * 2 * 2 * 2 * 2
    for key, found in measured.iterrows():
        length, global_heads, _, threads, pass_name, provider = cast("tuple[Any, ...]", key)
        row, fastest, slowest = (cast("Any", found[name]) for name in ("p50", "p10", "p90"))
        layout = HeadLayout.split(4, 4 if provider == "sdpa" else global_heads, 9)
        assert row.visible_pairs == 2 * layout.score_count(length, length)
        operations = {"forward": 4, "forward-backward": 14}[pass_name] * row.visible_pairs * 8
        assert row.gflops == pytest.approx(operations / row.milliseconds / 1e6, rel=1e-3)
        assert row.milliseconds == (row.cpu_milliseconds if threads == 1 else row.wall_milliseconds)
        assert np.isnan(row.cpu_milliseconds) == (threads > 1)
        assert fastest.milliseconds <= row.milliseconds <= slowest.milliseconds
        assert not np.isnan(row.speedup)
        if provider == "sdpa":
            assert row.speedup == 1
    rounds = results.rounds
    assert (rounds.peak_share * rounds.matmul_peak).tolist() == pytest.approx(rounds.gflops.tolist())
    assert "on 1 thread (matmul), " in shown[0]
    words = "3 heads of window 9, 1 global head, bfloat16, 2 threads, wall time, forward-backward"
    assert f"\n32 tokens, {words}" in shown


def test_the_peak_of_the_kernels_is_used_where_they_are_built(monkeypatch):
    monkeypatch.setattr(cpu, "fma_peak", lambda: 5e10)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 3)
    assert machine.measure_peak(2) == (1e11, "fma")
    assert machine.measure_peak(64) == (1.5e11, "fma")
    rows = measure(AttentionBenchmark(**SMALL)).rows
    assert "fma_peak" in set(rows["metric"])
    assert "matmul_peak" not in set(rows["metric"])


def test_the_peak_is_measured_in_each_round(monkeypatch):
    turns = []

    def fake(name):
        def run(q, _k, _v):
            turns.append(name)
            return q

        return lambda given: Kernel(run, given.layout, note="fake")

    for name in ("sdpa", "blockwise"):
        monkeypatch.setitem(PROVIDERS, name, fake(name))
    monkeypatch.setattr(
        bench_attention, "measure_peak", lambda _threads: (turns.append("peak") or 1e9, "fma")
    )
    results = measure(
        AttentionBenchmark(**SMALL, passes=("forward",), providers=("sdpa", "blockwise", "sdpa"))
    )
    assert turns[-9:] == ["sdpa", "blockwise", "peak"] * 3
    assert [(remark.provider, remark.text) for remark in results.notes] == [
        ("sdpa", "fake"), ("blockwise", "fake"),
    ]  # fmt: skip


def test_what_cannot_run_backward_runs_forward():
    results = measure(
        AttentionBenchmark(**SMALL, providers=("reference", "sdpa"), max_memory_gib=5 * 4 * 64**2 * 4 / 2**30)
    )
    measured = set(zip(results.rows["provider"], results.rows["pass"], strict=True))
    assert measured == {("reference", "forward"), *(("sdpa", name) for name in PASSES)}
    assert [remark.provider for remark in results.left_out] == ["reference"]
    assert "forward-backward" in results.left_out[0].case


def test_without_the_baseline_there_is_no_speedup():
    rows = measure(AttentionBenchmark(**SMALL, providers=("blockwise",))).rows
    assert list(dict.fromkeys(rows["pass"])) == list(PASSES)
    assert "speedup" not in set(rows["metric"])


def test_speedups_are_paired_by_round(monkeypatch):
    seconds = iter([9.0, 9.0, 1.0, 2.0, 12.0, 8.0, 1.0, 2.0])  # the first round warms up
    monkeypatch.setattr(bench_attention, "stopwatch", lambda _run: (next(seconds), 0.0))
    monkeypatch.setattr(bench_attention, "measure_peak", lambda _threads: (1e9, "fma"))
    settings = {**SMALL, "repeats": 3, "passes": ("forward",), "providers": ("sdpa", "blockwise")}
    found = metrics(measure(AttentionBenchmark(**settings)))
    assert [row["speedup"] for row in found.values()] == [1, 0.5]


def test_what_was_left_out_is_shown(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "local_attention", None)
    shown: list[str] = []
    benchmark = AttentionBenchmark(
        **{**SMALL, "lengths": (32, 64)}, providers=("local-attention", "reference", "sdpa"),
        passes=("forward",), global_heads=(0,), max_memory_gib=1e-4, out=tmp_path / "speed.csv",
    )  # fmt: skip
    results = measure(benchmark, show=shown.append)
    assert set(results.rows[results.rows["x"] == 64]["provider"]) == {"sdpa"}
    assert {remark.provider for remark in results.left_out} == {"local-attention", "reference"}
    told = "\n".join(shown)
    assert "not measured:" in told
    assert "  local-attention: not installed: pip install local-attention" in told
    assert "(2 settings)" in told
    assert "  reference: arrays of 64 × 64" in told


def test_a_provider_that_fails_is_left_out(monkeypatch):
    def run(_q, _k, _v):
        raise RuntimeError("no memory left\nat all")

    monkeypatch.setitem(PROVIDERS, "blockwise", lambda given: Kernel(run, given.layout))
    results = measure(AttentionBenchmark(**SMALL, providers=("blockwise", "sdpa")))
    assert set(results.rows["provider"]) == {"sdpa"}
    assert [remark.text for remark in results.left_out] == ["failed: RuntimeError: no memory left"] * 2
    assert [remark.case.split(", ")[-1] for remark in results.left_out] == list(PASSES)


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="nothing was measured: local-attention has no global heads"):
        measure(AttentionBenchmark(**SMALL, providers=("local-attention",)))


def test_the_backends_are_providers():
    assert set(BACKENDS) < set(PROVIDERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"providers": ("warp",)}, "--providers must be among .*sdpa-masked, .*, got 'warp'"),
        ({"providers": ()}, "--providers must name at least one, got none"),
        ({"dtypes": ("int8",)}, "--dtypes must be among float32, bfloat16, float16, float64, got 'int8'"),
        ({"passes": ("sideways",)}, "--passes must be among forward, forward-backward, got 'sideways'"),
        ({"window": (9, 0)}, "--window must be an integer >= 1, got 0"),
        ({"window": ()}, "--window must name at least one, got none"),
        ({"lengths": (-1,)}, "--lengths must be an integer >= 1, got -1"),
        ({"threads": (0,)}, "--threads must be an integer >= 1, got 0"),
        ({"heads": 0}, "--heads must be an integer >= 1, got 0"),
        ({"head_dim": 0}, "--head-dim must be an integer >= 1, got 0"),
        ({"batch": 0}, "--batch must be an integer >= 1, got 0"),
        ({"repeats": 0}, "--repeats must be an integer >= 1, got 0"),
        ({"global_heads": (1, 5)}, r"--global-heads must be at most --heads \(4\), got 5"),
        ({"global_heads": (-1,)}, "--global-heads must be an integer >= 0, got -1"),
        ({"global_heads": (1,), "kv_heads": 2}, "--global-heads must be a multiple of the 2 heads .*, got 1"),
        ({"kv_heads": 3}, r"--kv-heads must divide --heads \(4\), got 3"),
        ({"kv_heads": 0}, "--kv-heads must be an integer >= 1, got 0"),
        ({"max_memory_gib": 0.0}, "--max-memory-gib must be a number > 0, got 0.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AttentionBenchmark(**{**SMALL, **changes})


def test_more_threads_than_cores_are_allowed():
    cases = AttentionBenchmark(**SMALL, passes=("forward",), threads=(1000,)).cases()
    assert [case.threads for case in cases] == [1000]


def test_the_same_layout_is_measured_once():
    benchmark = AttentionBenchmark(**{**SMALL, "window": (9, 20)}, global_heads=(4, 1), passes=("forward",))
    assert [str(layout_of(case)) for case in benchmark.cases()] == [
        "HeadLayout(windows=(None,) * 4)",
        "HeadLayout(windows=(9,) * 3 + (None,))",
        "HeadLayout(windows=(20,) * 3 + (None,))",
    ]


def test_one_query_against_caches(monkeypatch):
    """A turn runs over the caches of all layers."""
    seconds = iter([9.0, 9.0, 9.0, 8.0, 4.0, 2.0, 8.0, 8.0, 4.0])  # sdpa, blockwise-global, blockwise

    def timed(run, _threads):
        run()
        return next(seconds)

    monkeypatch.setattr("longshort.bench.kernel.quiet_seconds", timed)
    providers = ("sdpa", "blockwise-global", "blockwise")
    benchmark = KernelBenchmark(
        lengths=(64,), layers=2, heads=4, kv_heads=2, global_heads=(2,), window=(9,), head_dim=8,
        dtypes=("bfloat16",), batch=3, rounds=2, providers=providers,
    )  # fmt: skip
    results = measure(benchmark)
    found = metrics(results)
    assert list(found) == [(64, name) for name in providers]
    microseconds = [found[64, name]["microseconds"] for name in providers]
    assert microseconds == [4e6, 3e6, 1.5e6]  # of one layer
    assert [found[64, name]["speedup"] for name in providers] == [1, 1.5, 3]
    keys = dict.fromkeys(providers, 2 * 64) | {"blockwise": 64 + 9}  # of both key/value heads
    for name in providers:
        assert found[64, name]["bytes_read"] == 3 * keys[name] * 2 * 8 * 2
        rate = found[64, name]["bytes_read"] / results.rounds["microseconds"].xs(name, level="provider") / 1e3
        assert found[64, name]["gigabytes_per_second"] == pytest.approx(rate.median(), rel=1e-4)


def test_a_kernel_that_is_not_built_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu, "_MISSING", "the C++ kernels are not built")
    benchmark = KernelBenchmark(lengths=(64,), layers=1, heads=2, head_dim=8, rounds=1)
    results = measure(benchmark)
    assert set(results.rows["provider"]) == {"sdpa"}
    assert {remark.provider for remark in results.left_out} == {"cpu", "cpu-global"}
    assert all("not built" in remark.text for remark in results.left_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers must be an integer >= 1, got 0"),
        ({"rounds": 0}, "--rounds must be an integer >= 1, got 0"),
        ({"global_heads": (13,)}, r"--global-heads must be at most --heads \(12\), got 13"),
        ({"providers": ("warp",)}, "--providers must be among sdpa, cpu, cpu-global, .*, got 'warp'"),
    ],
    ids=str,
)
def test_bad_settings_of_the_kernel_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        KernelBenchmark(**changes)

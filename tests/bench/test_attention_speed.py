import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longshort.attention import BACKENDS, attention
from longshort.backends import cpu
from longshort.bench import attention_speed, benchmarking
from longshort.bench.attention_providers import (
    PROVIDERS,
    Kernel,
    Problem,
    UnsuitableError,
    flex_block_mask,
    prepare,
    visible_pairs,
)
from longshort.bench.attention_speed import COLUMNS, measure_attention
from longshort.bench.speed_plot import plot_speed
from longshort.bench.speed_settings import PASSES, SpeedSettings
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
    monkeypatch.setattr(benchmarking, "_MATMUL_SIZE", 16)
    monkeypatch.setattr(cpu, "fma_peak", lambda: None)


def problem(layout, length=64, dtype=torch.float64, max_bytes=2.0**30):
    generator = torch.Generator().manual_seed(0)

    def random(heads):
        return torch.randn(2, heads, length, 8, generator=generator).to(dtype)

    k, v = random(layout.num_kv_heads), random(layout.num_kv_heads)
    return Problem(layout, random(layout.num_heads), k, v, max_bytes)


def assert_right(kernel, given):
    """Output and, where there are any, gradients are those of the layout that the provider claims."""
    results = []
    for run in (kernel.run, lambda q, k, v: attention(q, k, v, kernel.layout, backend="reference")):
        leaves = (given.q, given.k, given.v) if kernel.no_backward else given.leaves()
        out = run(*leaves)
        gradients = () if kernel.no_backward else torch.autograd.grad(out.square().sum(), leaves)
        results.append((out, *gradients))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name not in ("flex", "local-attention")])
def test_providers_compute_the_layout_that_they_claim(provider, layout):
    given = problem(layout, dtype=torch.float32 if provider.startswith("cpu") else torch.float64)
    kernel = prepare(provider, given)
    every_head_global = HeadLayout((None,) * layout.num_heads, layout.num_kv_heads)
    assert kernel.layout == (every_head_global if provider == "sdpa" else layout)
    assert_right(kernel, given)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("length", [64, 300])
def test_the_block_mask_is_the_layout(layout, length):
    """Each pair that is seen lies in a block that is taken, and each pair of a whole block is seen."""
    mask = flex_block_mask(layout, length)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    pairs = visible_pairs(layout, length)
    index = torch.arange(length)
    for head in range(layout.num_heads):
        part = mask.mask_mod(torch.tensor(0), torch.tensor(head), index[:, None], index[None])
        assert part.equal(pairs[head])
        for row in range(-(-length // 128)):
            taken, whole = (
                set(indices[0, head, row, : counts[0, head, row]].tolist())
                for counts, indices in (
                    (mask.kv_num_blocks, mask.kv_indices),
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                )
            )
            assert not taken & whole
            for column in range(-(-length // 128)):
                block = pairs[head, row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
                assert bool(block.any()) == (column in taken | whole)
                assert bool(block.all()) or column not in whole


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_flex_computes_the_layout(layout):
    given = problem(layout, length=300, dtype=torch.float32)
    kernel = prepare("flex", given)
    assert kernel.layout == layout
    assert kernel.note is not None
    assert "compilation" in kernel.note
    assert kernel.no_backward is not None
    assert_right(kernel, given)


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
    given = problem(HeadLayout.split(4, 0, 9))
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
        prepare("local-attention", problem(layout))


@pytest.mark.parametrize("provider", ["reference", "sdpa-masked"])
def test_arrays_beyond_the_memory_are_refused(provider):
    with pytest.raises(UnsuitableError, match=r"64 × 64 take about .* --max-memory-gib allows"):
        prepare(provider, problem(LAYOUTS[0], max_bytes=100_000))


def test_the_gradients_of_the_reference_need_more_memory():
    scores = 2 * 4 * 64 * 64 * 8
    kernel = prepare("reference", problem(LAYOUTS[0], max_bytes=5 * scores))
    assert kernel.no_backward is not None
    assert "GiB" in kernel.no_backward


def test_rows_and_columns(tmp_path):
    out = tmp_path / "speed.csv"
    settings = SpeedSettings(
        **{**SMALL, "lengths": (64, 32, 64)}, providers=("sdpa", "blockwise"), global_heads=(1, 0), batch=2,
        threads=(1, 2), dtypes=("float32", "bfloat16"), out=out,
    )  # fmt: skip
    threads = torch.get_num_threads()
    shown: list[str] = []
    results = measure_attention(settings, show=shown.append)
    assert torch.get_num_threads() == threads
    assert not results.skipped
    assert len(results.rows) == 2 * 2 * 2 * 2 * 2 * 2
    for row in results.rows:
        layout = HeadLayout.split(4, 4 if row.provider == "sdpa" else row.global_heads, 9)
        assert row.visible_pairs == 2 * layout.score_count(row.length, row.length)
        operations = {"forward": 4, "forward-backward": 14}[row.pass_name] * row.visible_pairs * 8
        assert row.gflops == pytest.approx(operations / row.milliseconds / 1e6, rel=1e-3)
        assert row.peak_share == pytest.approx(row.gflops / row.peak_gflops, rel=1e-3)
        assert row.milliseconds == (row.cpu_milliseconds if row.threads == 1 else row.wall_milliseconds)
        assert (row.cpu_milliseconds is None) == (row.threads > 1)
        assert row.milliseconds_p10 <= row.milliseconds <= row.milliseconds_p90
        assert row.speedup is not None
        if row.provider == "sdpa":
            assert row.speedup == 1

    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames == COLUMNS
    assert [line["provider"] for line in lines] == [row.provider for row in results.rows]
    assert [float(line["milliseconds"]) for line in lines] == [row.milliseconds for row in results.rows]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.csv", "speed.png"]
    assert shown[0].startswith(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, ")
    assert "on 1 thread (matmul)" in shown[0]
    assert any("3 heads of window 9, 1 global head, bfloat16, 2 threads" in text for text in shown)


def test_the_peak_of_the_kernels_is_used_where_they_are_built(monkeypatch):
    monkeypatch.setattr(cpu, "fma_peak", lambda: 5e10)
    monkeypatch.setattr(benchmarking.os, "cpu_count", lambda: 3)
    assert benchmarking.measure_peak(2) == (1e11, "fma")
    assert benchmarking.measure_peak(64) == (1.5e11, "fma")
    assert measure_attention(SpeedSettings(**SMALL)).rows[0].peak_kind == "fma"


def test_providers_take_turns(monkeypatch):
    turns = []

    def fake(name):
        def run(q, _k, _v):
            turns.append(name)
            return q

        return lambda given: Kernel(run, given.layout, no_backward="not here")

    for name in ("sdpa", "blockwise"):
        monkeypatch.setitem(PROVIDERS, name, fake(name))
    monkeypatch.setattr(
        attention_speed, "measure_peak", lambda _threads: (turns.append("peak") or 1e9, "fake")
    )
    settings = SpeedSettings(**SMALL, providers=("sdpa", "blockwise", "sdpa"))
    results = measure_attention(settings)
    assert turns[-9:] == ["sdpa", "blockwise", "peak"] * 3
    assert [remark.text for remark in results.skipped] == ["forward-backward: not here"] * 2


def test_without_the_baseline_there_is_no_speedup():
    rows = measure_attention(SpeedSettings(**SMALL, providers=("blockwise",))).rows
    assert [(row.pass_name, row.speedup) for row in rows] == [(name, None) for name in PASSES]


def test_speedups_are_paired_by_round(monkeypatch):
    seconds = iter([9.0, 9.0, 1.0, 2.0, 12.0, 8.0, 1.0, 2.0])  # the first round warms up
    monkeypatch.setattr(attention_speed, "stopwatch", lambda _run: (next(seconds), 0.0))
    monkeypatch.setattr(attention_speed, "measure_peak", lambda _threads: (1e9, "fake"))
    settings = {**SMALL, "repeats": 3, "passes": ("forward",), "providers": ("sdpa", "blockwise")}
    assert [row.speedup for row in measure_attention(SpeedSettings(**settings)).rows] == [1, 0.5]


def test_what_was_left_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "local_attention", None)
    shown: list[str] = []
    settings = SpeedSettings(
        **{**SMALL, "lengths": (32, 64)}, providers=("local-attention", "reference", "sdpa"),
        global_heads=(0,), max_memory_gib=1e-4, out=tmp_path / "speed.csv",
    )  # fmt: skip
    results = measure_attention(settings, show=shown.append)
    assert [row.provider for row in results.rows if row.length == 64] == ["sdpa", "sdpa"]
    assert {remark.provider for remark in results.skipped} == {"local-attention", "reference"}
    told = "\n".join(shown)
    assert "not measured:" in told
    assert "  local-attention: not installed: pip install local-attention" in told
    assert "(2 settings)" in told
    assert "  reference: arrays of 64 × 64" in told
    with settings.out.open(newline="") as file:  # type: ignore[union-attr]
        assert len(list(csv.DictReader(file))) == len(results.rows)


def test_a_provider_that_fails_is_left_out(monkeypatch):
    def run(_q, _k, _v):
        raise RuntimeError("no memory left\nat all")

    monkeypatch.setitem(PROVIDERS, "blockwise", lambda given: Kernel(run, given.layout))
    results = measure_attention(SpeedSettings(**SMALL, providers=("blockwise", "sdpa")))
    assert {row.provider for row in results.rows} == {"sdpa"}
    assert [remark.text for remark in results.skipped] == [
        f"{name} failed: RuntimeError: no memory left" for name in PASSES
    ]


def test_an_interrupted_sweep_keeps_its_rows(monkeypatch, tmp_path):
    out = tmp_path / "speed.csv"
    out.write_text("older")

    def show(text):
        if text.startswith("\n64 tokens"):
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    settings = {**SMALL, "lengths": (32, 64), "threads": (2,), "out": out}
    with pytest.raises(KeyboardInterrupt):
        measure_attention(SpeedSettings(**settings, overwrite=True), show=show)
    assert torch.get_num_threads() == threads
    assert out.read_text() == "older"
    with (tmp_path / "speed.csv.partial").open(newline="") as file:
        assert {row["length"] for row in csv.DictReader(file)} == {"32"}
    out.unlink()
    with pytest.raises(FileExistsError, match=r"speed\.csv\.partial exists; --overwrite"):
        measure_attention(SpeedSettings(**settings))


def test_nothing_measured_leaves_nothing(tmp_path):
    settings = SpeedSettings(**SMALL, providers=("local-attention",), out=tmp_path / "speed.csv")
    with pytest.raises(ValueError, match="nothing was measured"):
        measure_attention(settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["speed.csv", "speed.png"])
def test_files_are_not_overwritten_unasked(tmp_path, name):
    old = tmp_path / name
    old.write_text("precious")
    settings = {**SMALL, "providers": ("sdpa",), "out": tmp_path / "speed.csv"}
    with pytest.raises(FileExistsError, match=f"{name} exists; --overwrite replaces it"):
        measure_attention(SpeedSettings(**settings))
    assert old.read_text() == "precious"
    measure_attention(SpeedSettings(**settings, overwrite=True))
    assert old.read_bytes() != b"precious"


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "speed.png").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        measure_attention(SpeedSettings(**SMALL, out=tmp_path / "speed.csv", overwrite=True))


def test_a_plot_needs_rows(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        plot_speed([], tmp_path / "speed.png")


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
        SpeedSettings(**{**SMALL, **changes})


def test_more_threads_than_cores_are_allowed():
    assert [setting.threads for setting in SpeedSettings(**SMALL, threads=(1000,)).sweep()] == [1000]


def test_the_same_layout_is_measured_once():
    settings = SpeedSettings(**{**SMALL, "window": (9, 20)}, global_heads=(4, 1))
    assert [str(setting.layout) for setting in settings.sweep()] == [
        "HeadLayout(windows=(None,) * 4)",
        "HeadLayout(windows=(9,) * 3 + (None,))",
        "HeadLayout(windows=(20,) * 3 + (None,))",
    ]

"""What can be tested of the benchmark of attention on GPUs without one: its flags, what providers get and
refuse, and what is derived from times."""

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tests.bench.test_attention import LAYOUTS, assert_right, inputs
from tests.bench.toy import metrics
from torch.nn import functional as F
from torch.nn.attention import varlen

from longshort.bench import attention as bench_attention
from longshort.bench import machine, plot
from longshort.bench.attention import AttentionBenchmark
from longshort.bench.attention_providers import ON_GPU, PROVIDERS, AttentionInputs, Kernel, prepare
from longshort.bench.benchmark import UnsuitableError
from longshort.bench.kernel import KernelBenchmark
from longshort.bench.sweep import measure
from longshort.cli import main
from longshort.layout import HeadLayout

SMALL = {"heads": 4, "window": (9,), "head_dim": 8}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose tensors are on the CPU and whose times are those that a test gives."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for benchmark in (AttentionBenchmark, KernelBenchmark):
        monkeypatch.setattr(benchmark, "torch_device", torch.device("cpu"))


@pytest.fixture
def any_device(monkeypatch):
    """Providers for GPUs whose kernels a test replaces."""
    monkeypatch.setattr(AttentionInputs, "require_gpu", lambda *_: None)


def test_defaults_depend_on_the_device(gpu):
    on_gpu, on_cpu = AttentionBenchmark(device="cuda"), AttentionBenchmark()
    assert on_gpu.lengths == (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
    assert (on_gpu.dtypes, on_gpu.providers) == (("bfloat16",), ON_GPU)
    assert (on_cpu.lengths, on_cpu.dtypes) == ((2048, 8192), ("float32",))
    assert on_cpu.providers == ("cpu", "blockwise", "sdpa")
    assert set(ON_GPU) < set(PROVIDERS)
    assert AttentionBenchmark(device="cuda", lengths=(5,), dtypes=("float32",)).lengths == (5,)
    assert KernelBenchmark(device="cuda").providers == ("sdpa", "triton-global", "triton")
    assert KernelBenchmark().providers == ("sdpa", "cpu-global", "cpu")
    words = "11 heads of window 100, 1 global head, bfloat16, cuda, forward"
    assert str(on_gpu.cases()[0]) == f"2048 tokens, {words}"


@pytest.mark.parametrize("benchmark", ["attention", "kernel"])
def test_a_gpu_that_is_missing_is_a_wrong_flag(fails, monkeypatch, benchmark):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "--device cuda needs a GPU that torch can use, and there is none"
    assert message in fails(2, "bench", benchmark, "--device", "cuda")
    assert "--device must be among cpu, cuda, got 'tpu'" in fails(2, "bench", benchmark, "--device", "tpu")


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        ("triton", "the tensors are on cpu, not on a GPU"),
        ("triton-statistics", "the tensors are on cpu, not on a GPU"),
        ("sdpa-flash", "sdpa-flash runs on GPUs alone: --device cuda"),
        ("sdpa-cudnn", "sdpa-cudnn runs on GPUs alone: --device cuda"),
        ("sdpa-efficient", "sdpa-efficient runs on GPUs alone: --device cuda"),
        ("varlen", "varlen runs on GPUs alone: --device cuda"),
        ("flash-sparse-attn", "flash-sparse-attn runs on GPUs alone: --device cuda"),
    ],
)
def test_providers_for_gpus_say_so_on_a_cpu(monkeypatch, provider, reason):
    monkeypatch.setitem(sys.modules, "flash_sparse_attn", SimpleNamespace())
    with pytest.raises(UnsuitableError, match=reason):
        prepare(provider, inputs(LAYOUTS[0], dtype=torch.float32, with_gradients=False))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_sparse_attn", None)
    with pytest.raises(UnsuitableError, match="not installed: pip install flash-sparse-attn"):
        prepare("flash-sparse-attn", inputs(LAYOUTS[0]))


def test_arrays_of_scores_beyond_the_memory_are_refused():
    with pytest.raises(UnsuitableError, match="--max-memory-gib allows"):
        prepare("sdpa-math", inputs(LAYOUTS[0], max_bytes=100_000))


def masked(q, k, v, seen):
    """Attention of (batch, sequence, heads, head_dim) where `seen` is (…, q_len, kv_len)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def distances(q_len, kv_len):
    return torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)


def plain_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    """What varlen_attn computes for sequences of one length, as its documentation says."""
    assert cu_seq_q.tolist() == list(range(0, q.shape[0] + 1, max_q))
    assert cu_seq_k.tolist() == list(range(0, k.shape[0] + 1, max_k))
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0
    behind = distances(max_q, max_k)
    seen = (behind >= 0) & ((behind <= left) | (left == -1))
    q, k, v = (x.unflatten(0, (-1, size)) for x, size in ((q, max_q), (k, max_k), (v, max_k)))
    return masked(q, k, v, seen).flatten(0, 1)


def plain_flash_dense_attn(q, k, v, *, is_causal, window_sizes):
    """What flash-sparse-attn 2.0.6 computes with these settings, as its source says."""
    assert is_causal
    assert window_sizes.dtype == torch.int32
    sink, left, gap, near = (column[:, None, None] for column in window_sizes.unbind(1))
    behind = distances(q.shape[1], k.shape[1])
    index = torch.arange(k.shape[1])
    seen = (behind < near) | ((behind >= near + gap) & (behind < near + gap + left)) | (index < sink)
    seen = ((behind >= 0) & seen).repeat_interleave(q.shape[2] // k.shape[2], 0)
    return masked(q, k, v, seen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("provider", ["varlen", "flash-sparse-attn"])
def test_kernels_of_others_get_the_windows_of_the_layout(monkeypatch, any_device, provider, layout):
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen_attn)
    package = SimpleNamespace(flash_dense_attn_func=plain_flash_dense_attn)
    monkeypatch.setitem(sys.modules, "flash_sparse_attn", package)
    for given in (inputs(layout), inputs(layout, queries=1, with_gradients=False)):
        kernel = prepare(provider, given)
        assert kernel.layout == layout
        assert_right(kernel, given)


def test_varlen_takes_windows_side_by_side_and_a_torch_that_has_them(monkeypatch, any_device):
    with pytest.raises(UnsuitableError, match="varlen takes heads of one window side by side"):
        prepare("varlen", inputs(HeadLayout((9, None, 9, None))))
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v: q)
    with pytest.raises(UnsuitableError, match=r"varlen_attn of torch .* has no windows"):
        prepare("varlen", inputs(LAYOUTS[0]))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(UnsuitableError, match="has no varlen_attn"):
        prepare("varlen", inputs(LAYOUTS[0]))


def test_rates_are_shares_of_the_peaks(gpu, monkeypatch):
    monkeypatch.setattr(bench_attention, "device_seconds", lambda run, _device: (run(), 2e-3)[1])
    monkeypatch.setattr(bench_attention, "measure_gpu_peak", lambda _device, _dtype: 4e9)
    monkeypatch.setattr(bench_attention, "measure_copy_rate", lambda _device: 8e8)
    providers = ("sdpa", "blockwise")
    shown: list[str] = []
    benchmark = AttentionBenchmark(device="cuda", lengths=(64,), repeats=2, providers=providers, **SMALL)
    results = measure(benchmark, show=shown.append)
    layout = HeadLayout.split(4, 1, 9)
    forward = results.rows[results.rows["pass"] == "forward"]
    found = metrics(results._replace(rows=forward))[64, "blockwise"]
    assert found["milliseconds"] == 2
    assert found["gflops"] == pytest.approx(4 * 8 * layout.score_count(64, 64) / 2e-3 / 1e9, rel=1e-4)
    assert found["peak_share"] == pytest.approx(found["gflops"] / 4, rel=1e-4)
    assert found["bytes_moved"] == 4 * 4 * 64 * 8 * 2  # q, k, v and out in bfloat16
    assert found["gigabytes_per_second"] == pytest.approx(found["bytes_moved"] / 2e-3 / 1e9, rel=1e-4)
    assert found["copy_share"] == pytest.approx(found["gigabytes_per_second"] / 0.8, rel=1e-4)
    assert set(results.rows["device"]) == {"cuda"}
    both = results.rows[results.rows["pass"] == "forward-backward"]
    assert "copy_share" not in set(both["metric"])
    assert "TFLOP/s" in next(line for line in shown if "provider" in line)


def test_whatever_a_kernel_raises_on_a_gpu_leaves_out_it_alone(gpu, monkeypatch):
    def fails(_q, _k, _v):
        raise AssertionError("tiles do not fit")

    def cannot_be_prepared(_given):
        raise TypeError("no such option")

    monkeypatch.setattr(bench_attention, "device_seconds", lambda run, _device: (run(), 2e-3)[1])
    monkeypatch.setattr(bench_attention, "measure_gpu_peak", lambda _device, _dtype: 4e9)
    monkeypatch.setattr(bench_attention, "measure_copy_rate", lambda _device: 8e8)
    monkeypatch.setitem(PROVIDERS, "varlen", lambda given: Kernel(fails, given.layout))
    monkeypatch.setitem(PROVIDERS, "flex", cannot_be_prepared)
    settings = {"lengths": (64,), "repeats": 1, "passes": ("forward",), **SMALL}
    results = measure(AttentionBenchmark(device="cuda", providers=("varlen", "flex", "sdpa"), **settings))
    assert set(results.rows["provider"]) == {"sdpa"}
    assert sorted(remark.text for remark in results.left_out) == [
        "failed: RuntimeError: AssertionError: tiles do not fit",
        "failed: RuntimeError: TypeError: no such option",
    ]
    with pytest.raises(AssertionError, match="tiles do not fit"):
        measure(AttentionBenchmark(providers=("varlen",), **settings))


def test_one_query_is_timed_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr("longshort.bench.kernel.device_seconds", lambda run, _device: (run(), 6e-6)[1])
    benchmark = KernelBenchmark(
        device="cuda", lengths=(64,), layers=2, rounds=1, providers=("sdpa", "blockwise"), **SMALL
    )
    assert [row["microseconds"] for row in metrics(measure(benchmark)).values()] == [3, 3]


def test_wall_time_begins_when_the_gpu_is_idle_and_ends_when_it_is_done(monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: done.append("wait"))
    assert machine.wall_seconds(lambda: done.append("run"), torch.device("cuda")) > 0
    assert done == ["wait", "run", "wait"]


def test_no_two_providers_look_alike_in_a_plot():
    looks = [plot._look(number) for number in range(len(AttentionBenchmark.known))]
    assert len(set(looks)) == len(looks)


class FakeEvent:
    """An event whose times are scripted, in seconds."""

    clock: Iterator[float] = iter(())

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = next(FakeEvent.clock)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)

    def script(*durations):
        times = [sum(durations[:index]) for index in range(len(durations) + 1)]
        pairs = pairwise(times)
        FakeEvent.clock = iter([time for pair in pairs for time in pair])

    return script


def test_short_runs_are_repeated_and_long_ones_are_not(scripted):
    calls = []
    scripted(0.04, 0.01, 0.03)
    assert machine.device_seconds(lambda: calls.append(0), torch.device("cpu")) == pytest.approx(0.02)
    assert len(calls) == 3
    scripted(0.3)
    assert machine.device_seconds(lambda: calls.append(0), torch.device("cpu")) == pytest.approx(0.3)
    assert len(calls) == 4
    scripted(*[0.001] * 21)
    machine.device_seconds(lambda: calls.append(0), torch.device("cpu"))
    assert len(calls) == 25


def test_peaks_of_a_gpu(scripted, monkeypatch):
    monkeypatch.setattr(machine, "_GPU_MATMUL_SIZE", 16)
    monkeypatch.setattr(machine, "_COPIED_BYTES", 1000)
    scripted(0.5)
    assert machine.measure_gpu_peak(torch.device("cpu"), torch.bfloat16) == pytest.approx(4 * 16**3)
    scripted(0.5)
    assert machine.measure_copy_rate(torch.device("cpu")) == pytest.approx(4000)


def test_help_names_the_providers(capsys):
    assert main(["bench", "attention", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--device" in shown
    for provider in ("sdpa-cudnn", "varlen", "flash-sparse-attn"):
        assert provider in shown

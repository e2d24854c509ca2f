"""The C++ kernels: block edges, instruction sets, decoding, threads, registration, memory.

What all backends promise is in test_backends.py.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from tests.attention_cases import (
    Case,
    assert_as_good_as_plain,
    random_case,
    visibility,
    visibility_of_one_segment,
)

from longshort import HeadLayout, attention, explain
from longshort.backends import cpu

ROOT = Path(__file__).parents[2]


def normal_case(seed: int, layout: HeadLayout, q_len: int, kv_len: int, head_dim: int, **options) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, length: int) -> torch.Tensor:
        shape = (2, length, heads, head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2)

    q, k, v = (
        normal(layout.num_heads, q_len),
        normal(layout.num_kv_heads, kv_len),
        normal(layout.num_kv_heads, kv_len),
    )
    return Case(q, k, v, layout, options)


def run_python(code: str, **environment: str) -> str:
    """What the code prints in a process of its own."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


# -- numbers


def test_the_fast_truth_of_long_cases_is_the_slow_one():
    layout = HeadLayout((1, 5, 30, None), sink_tokens=2)
    for causal in (True, False):
        case = normal_case(0, layout, 20, 40, 4, causal=causal)
        assert torch.equal(visibility(case), visibility_of_one_segment(case))


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(257, 257), (512, 513), (255, 641), (300, 900), (770, 770), (33, 400)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_around_the_blocks(q_len: int, kv_len: int, causal: bool):
    layout = HeadLayout((1, 16, 100, 129, 400, None), sink_tokens=kv_len % 3)
    assert_as_good_as_plain(
        normal_case(kv_len, layout, q_len, kv_len, 20, causal=causal), torch.float32, "cpu"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 8, 15, 16, 17, 32, 33, 48, 64, 80, 96, 127, 128, 200, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype):
    layout = HeadLayout((40, 40, None, None), num_kv_heads=2)
    assert_as_good_as_plain(normal_case(head_dim, layout, 150, 210, head_dim), dtype, "cpu")


def test_packed_documents_longer_than_blocks():
    case = normal_case(1, HeadLayout((70, None), sink_tokens=3), 290, 300, 16, softcap=9.0)
    ids = torch.zeros(2, 300, dtype=torch.int64)
    ids[0, 130:] = 2**40
    ids[1, 7:200] = -1
    ids[1, 250:] = 5
    case.options["segment_ids"] = ids
    assert_as_good_as_plain(case, torch.float32, "cpu")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ids", ["one segment", "a segment in two runs"])
def test_sinks_far_from_the_queries(causal: bool, ids: str):
    case = normal_case(3, HeadLayout((4, None), sink_tokens=400), 700, 700, 8, causal=causal)
    if ids != "one segment":
        case.layout = HeadLayout((4, None), sink_tokens=5)
        segments = torch.ones(2, 700, dtype=torch.int64)
        segments[:, :3] = segments[:, 690:] = 0
        case.options["segment_ids"] = segments
        case.q, case.k, case.v = case.q[:1], case.k[:1], case.v[:1]
        case.options["segment_ids"] = segments[:1]
    assert_as_good_as_plain(case, torch.float32, "cpu")


def test_slopes_that_grow_with_the_distance():
    """Negative ALiBi slopes, and a number of queries that is no multiple of the kernels' rows."""
    case = normal_case(5, HeadLayout((None, None)), 131, 131, 8, alibi_slopes=torch.tensor([-1.0, -0.97]))
    assert_as_good_as_plain(case, torch.float32, "cpu")


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("logit", [100.0, 1e4])
def test_large_logits(head_dim: int, logit: float):
    case = normal_case(head_dim, HeadLayout((100, None)), 600, 600, head_dim)
    case.q *= logit / 4
    assert_as_good_as_plain(case, torch.float32, "cpu")


@pytest.mark.parametrize("seed", range(6))
def test_few_queries_against_many_keys(seed: int):
    """The decoding path, which calls without gradients take."""
    queries, group = [(1, 1), (1, 4), (3, 2), (8, 1), (5, 3), (2, 20)][seed]
    windows = ((100,) * group + (None,) * group, (700,) * group + (None,) * group)[seed % 2]
    layout = HeadLayout(windows, 2, sink_tokens=seed % 3)
    options = {"softcap": 8.0, "alibi_slopes": torch.rand(2 * group)} if seed % 2 else {}
    case = normal_case(seed, layout, queries, 2000 + seed, (64, 24, 128, 5, 96, 200)[seed], **options)
    assert_as_good_as_plain(case, torch.float32, "cpu", with_gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_random_calls(dtype: torch.dtype):
    """Every option at once."""
    for seed in range(6000, 6040):
        case = random_case(seed, max_length=150)
        case.q = case.q[:, :, -(1 + seed % 5) :]
        assert_as_good_as_plain(case, dtype, "cpu", with_gradients=False)


@pytest.mark.parametrize("place", ["k", "v"])
def test_decoding_keeps_the_nan_of_a_chunk_with_small_logits(place: str):
    q, k, v = torch.randn(1, 1, 1, 16), *torch.randn(2, 1, 1, 1100, 16).unbind()
    k[..., 1000, :] = 200 * q[..., 0, :]
    (k if place == "k" else v)[..., 5, :] = torch.nan
    out, stats = attention(q, k, v, HeadLayout((None,)), backend="cpu", return_stats=True)
    assert out.isnan().all()
    assert stats.lse.isnan().all() == (place == "k")


RANDOM_CALLS = """
import torch
from tests.attention_cases import Case, assert_as_good_as_plain, random_case
from longshort import HeadLayout
from longshort.backends import cpu
torch.set_num_threads(1)
torch.manual_seed(0)
for seed in range(8000, 8060):
    large = 2000.0 if seed % 7 == 0 else 1.0
    case = random_case(seed, max_length=150, logit_scale=large)
    assert_as_good_as_plain(case, torch.float32 if seed % 3 or large > 1 else torch.bfloat16, "cpu")
    case.q = case.q[:, :, -3:]
    assert_as_good_as_plain(case, torch.float32, "cpu", with_gradients=False)
for q_len, kv_len in ((300, 700), (520, 520)):
    q = torch.randn(1, 3, q_len, 24, dtype=torch.float64)
    k, v = torch.randn(2, 1, 3, kv_len, 24, dtype=torch.float64).unbind()
    case = Case(q, k, v, HeadLayout((100, 400, None), sink_tokens=2), {"causal": q_len < kv_len})
    assert_as_good_as_plain(case, torch.float32, "cpu")
print(cpu.instruction_set())
"""


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_each_instruction_set(name: str):
    assert run_python(RANDOM_CALLS, LONGSHORT_CPU=name) == name


def test_an_instruction_set_that_is_not_there_is_refused():
    code = """
try:
    from longshort import attention
except ImportError as error:
    print(error)
"""
    names = ", ".join(cpu.instruction_sets())
    expected = f"LONGSHORT_CPU must be one of {names} on this processor, got v9"
    assert expected in run_python(code, LONGSHORT_CPU="v9")


# -- threads


@pytest.fixture
def threads():
    """Sets the number of threads, until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(case: Case) -> list[torch.Tensor]:
    q, k, v = (x.float().detach().requires_grad_() for x in (case.q, case.k, case.v))
    out, stats = attention(q, k, v, case.layout, backend="cpu", return_stats=True, **case.options)
    gradients = torch.autograd.grad((out * out.cos()).sum() + stats.lse.sum(), (q, k, v))
    with torch.no_grad():
        decoded = attention(q[:, :, -1:], k, v, case.layout, backend="cpu", **case.options)
    return [out, stats.lse, stats.max_logit, stats.entropy, decoded, *gradients]


@pytest.mark.parametrize("windows", [(None,), (100, 100, None), (30,)])
def test_the_number_of_threads_changes_no_bit(windows: tuple[int | None, ...], threads):
    case = normal_case(4, HeadLayout(windows), 1000, 1100, 32)
    threads(1)
    expected = everything(case)
    for count in (2, 3, 2, 5):
        threads(count)
        assert all(torch.equal(ours, one) for ours, one in zip(everything(case), expected, strict=True))


def test_calls_from_several_python_threads(threads):
    threads(2)
    cases = [normal_case(seed, HeadLayout((50, None)), 300, 300, 16 * (1 + seed % 3)) for seed in range(8)]
    expected = [everything(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for ours, one in zip(pool.map(everything, cases * 3), expected * 3, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, one, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_with_one_thread():
    code = """
import os, torch
from longshort import HeadLayout, attention
torch.set_num_threads(2)
q, k, v = torch.randn(3, 1, 4, 600, 16).unbind()
layout = HeadLayout.split(4, 1, 50)
expected = attention(q, k, v, layout, backend="cpu")
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = torch.equal(attention(q, k, v, layout, backend="cpu"), expected)
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code) == "0"


# -- torch


def operator_arguments(with_stats: bool, requires_grad: bool = True):
    q = torch.randn(2, 9, 4, 8).transpose(1, 2).requires_grad_(requires_grad)
    k, v = (torch.randn(2, 2, 12, 8, requires_grad=requires_grad) for _ in range(2))
    ids = torch.randint(-1, 2, (2, 12))
    return (q, k, v, torch.rand(4), ids, [3, -1], 2, True, 0.3, 5.0, torch.float32, with_stats, True)


@pytest.mark.parametrize("with_stats", [True, False])
def test_opcheck(with_stats: bool):
    torch.library.opcheck(torch.ops.longshort.cpu_attention.default, operator_arguments(with_stats))


@pytest.mark.parametrize("with_lse", [True, False])
def test_opcheck_of_attention_to_a_cache(with_lse: bool):
    q, k, v = torch.randn(3, 2, 3, 1, 8).unbind()
    stores = [torch.randn(2, 2, 2, 4, 8), torch.randn(2, 2, 1, 20, 8)]
    sinks = [torch.randn(2, 2, 2, 1, 8), torch.randn(2, 2, 1, 0, 8)]
    positions = [torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)]
    torch.library.opcheck(
        torch.ops.longshort.cpu_attend_cached.default,
        (q, k, v, stores, sinks, positions, [4, 0], [7, 0], [0, 0, 1], [4, 4, -1], 1, 10, 0.3, None, None,
         None, with_lse),
    )  # fmt: skip


@pytest.mark.parametrize("gradients", ["out", "lse", "both"])
def test_opcheck_of_the_backward_pass(gradients: str):
    q, k, v, slopes, ids, *options = operator_arguments(False, requires_grad=False)
    out, row_max, log_sum, _, _ = torch.ops.longshort.cpu_attention(q, k, v, slopes, ids, *options)
    grad_out = torch.randn_like(out) if gradients != "lse" else None
    grad_lse = torch.randn_like(log_sum) if gradients != "out" else None
    saved = (q, k, v, slopes, ids, out, row_max, log_sum)
    torch.library.opcheck(
        torch.ops.longshort.cpu_attention_backward.default, (*saved, grad_out, grad_lse, *options[:5])
    )


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_more_than_32_bits_is_one_of_all_keys(causal: bool):
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()

    def results(window: int) -> list[torch.Tensor]:
        options = ([window, 3], 0, causal, 0.3, None)
        out, row_max, log_sum, *_ = torch.ops.longshort.cpu_attention(
            q, k, v, None, None, *options, q.dtype, False, True
        )
        gradients = torch.ops.longshort.cpu_attention_backward(
            q, k, v, None, None, out, row_max, log_sum, torch.ones_like(out), None, *options
        )
        return [out, row_max, log_sum, *gradients]

    for long, whole in zip(results(2**40), results(40), strict=True):
        assert torch.equal(long, whole)


def test_statistics_have_a_gradient_through_lse_alone():
    q, k, v = torch.randn(3, 1, 2, 20, 8).requires_grad_().unbind()
    _, stats = attention(q, k, v, HeadLayout((4, None)), backend="cpu", return_stats=True)
    assert stats.lse.requires_grad
    assert not stats.max_logit.requires_grad
    assert not stats.entropy.requires_grad


def test_activation_checkpointing():
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))

    def block(q, k, v):
        return attention(q, k, v, HeadLayout((4, None)), backend="cpu").square().sum()

    expected = torch.autograd.grad(block(q, k, v), (q, k, v))
    again = torch.utils.checkpoint.checkpoint(block, q, k, v, use_reentrant=False)
    assert isinstance(again, torch.Tensor)
    for ours, theirs in zip(torch.autograd.grad(again, (q, k, v)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_results_lie_in_memory_as_the_inputs_do():
    """What the projections around the layer read without another copy."""
    q, k, v = (torch.randn(2, 30, 4, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    out = attention(q, k, v, HeadLayout((4, 4, None, None)), backend="cpu")
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *gradients))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "reason"),
    [
        (torch.float64, 8, {}, "q is torch.float64; the kernels compute float32 and bfloat16"),
        (torch.float16, 8, {}, "q is torch.float16; the kernels compute float32 and bfloat16"),
        (torch.float32, 257, {}, "head_dim is 257; the kernels take at most 256"),
        (torch.bfloat16, 8, {"round_probabilities": True}, "the kernels do not round probabilities"),
    ],
)
def test_what_is_refused(dtype: torch.dtype, head_dim: int, options: dict, reason: str):
    x = torch.zeros(1, 2, 4, head_dim, dtype=dtype)
    layout = HeadLayout((3, None))
    assert explain(x, x, x, layout, **options).reasons["cpu"] == reason
    with pytest.raises(ValueError, match=f"backend 'cpu' cannot serve this call: {reason}"):
        attention(x, x, x, layout, backend="cpu", **options)


def test_without_the_kernels_blockwise_serves(monkeypatch):
    monkeypatch.setattr(cpu, "_kernels", None)
    monkeypatch.setattr(cpu, "_MISSING", "no compiler was there")
    x = torch.zeros(1, 2, 4, 8)
    explanation = explain(x, x, x, HeadLayout((3, None)))
    assert explanation.backend == "blockwise"
    assert explanation.reasons["cpu"] == "no compiler was there"
    assert cpu.instruction_set() is None
    assert cpu.fma_peak() is None


# -- memory

MEMORY_PROBE = """
import sys, torch
from longshort import HeadLayout, attention
torch.set_num_threads(2)

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

length = int(sys.argv[1])
small = [torch.randn(1, 12, 64, 64, requires_grad=True) for _ in range(3)]
attention(*small, HeadLayout.split(12, 1, 100), backend="cpu").sum().backward()
q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in torch.randn(1, length, 12, 192).chunk(3, -1))
with open("/proc/self/clear_refs", "w") as reset_peak:
    reset_peak.write("5")
before = memory("VmRSS")
out = attention(q, k, v, HeadLayout.split(12, 1, 100), backend="cpu")
gradients = torch.autograd.grad(out, (q, k, v), torch.ones(()).expand_as(out))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("length", [16_384, pytest.param(65_536, marks=pytest.mark.slow)])
def test_memory_beyond_outputs_and_gradients(length: int):
    """Forward and backward of 12 heads of 64, one of them global, from strided inputs."""
    probe = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(length)], capture_output=True, text=True, check=True
    )
    tensor = 12 * length * 64 * 4 / 2**20  # out and each gradient, in MiB
    assert 4 * tensor * 0.9 < float(probe.stdout) < 4 * tensor + 64

"""The kernels on a GPU against the truth in float64, over random calls with all options together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.attention_cases import (
    Case,
    Result,
    assert_result_as_good_as_plain,
    computed,
    random_case,
)
from tests.cuda.device import GPU, needs_gpu
from torch import Tensor

from longshort import HeadLayout, attention, explain
from longshort.backends import triton

pytestmark = needs_gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(case: Case) -> Case:
    options = {key: x.to(GPU) if isinstance(x, Tensor) else x for key, x in case.options.items()}
    return Case(case.q.to(GPU), case.k.to(GPU), case.v.to(GPU), case.layout, options)


def on_cpu(result: Result) -> Result:
    numbers = (result.out, result.lse, result.max_logit, result.entropy)
    out, lse, max_logit, entropy = (x.cpu() for x in numbers)
    return Result(out, lse, max_logit, entropy, [x.cpu() for x in result.gradients])


def attend(tensors: list[Tensor], layout: HeadLayout, **options: Any) -> Any:
    q, k, v = tensors
    return attention(q, k, v, layout, backend="triton", **options)


def wide_case(seed: int, head_dim: int, length: int = 300) -> Case:
    """A random call with heads as wide as a model's."""
    case = random_case(seed, max_length=length)
    batch, heads, q_len, _ = case.q.shape
    kv_heads, kv_len = case.k.shape[1:3]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, count, size, head_dim, generator=generator, dtype=torch.float64)
        for count, size in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    return Case(q, k, v, case.layout, case.options)


def test_a_gpu_is_served_by_triton() -> None:
    q = torch.randn(1, 2, 8, 16, device=GPU)
    assert triton.missing(GPU) is None
    assert explain(q, q, q, HeadLayout.split(2, 1, 4)).backend == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, max_length=200).cast(dtype)
    assert_result_as_good_as_plain(on_cpu(computed(on_gpu(case), "triton")), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("seed", range(300, 306))
def test_heads_of_models(seed: int, head_dim: int, dtype: torch.dtype) -> None:
    case = wide_case(seed, head_dim).cast(dtype)
    assert_result_as_good_as_plain(on_cpu(computed(on_gpu(case), "triton")), case)


@pytest.mark.parametrize("seed", range(60, 66))
def test_large_logits(seed: int) -> None:
    case = random_case(seed, logit_scale=100.0).cast(torch.float32)
    assert_result_as_good_as_plain(on_cpu(computed(on_gpu(case), "triton")), case)


def test_tensor_cores_for_fp32_where_torch_may_use_them() -> None:
    case = on_gpu(wide_case(7, 64).cast(torch.float32))
    exact = computed(case, "triton")
    torch.set_float32_matmul_precision("high")
    try:
        fast = computed(case, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(fast.out, exact.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.gradients, exact.gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_the_same_bits_again_and_without_statistics(seed: int, dtype: torch.dtype) -> None:
    case = on_gpu(wide_case(seed, 64).cast(dtype))
    first, second = (computed(case, "triton") for _ in range(2))
    for name in ("out", "lse", "max_logit", "entropy"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert all(map(torch.equal, first.gradients, second.gradients))
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    grad = torch.randn_like(case.q)
    found = []
    for with_stats in (False, True):
        got = attend(leaves, case.layout, return_stats=with_stats, **case.options)
        out = got[0] if with_stats else got
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_hidden_changes_no_bit(dtype: torch.dtype, place: int, value: float) -> None:
    """A number in padding, in another segment or beyond the window, and one that is not finite there."""
    layout = HeadLayout((None, 20, 20, 100), 4, sink_tokens=2)
    ids = torch.zeros(2, 300, dtype=torch.int64, device=GPU)
    ids[0, 260:], ids[1, 100:] = -1, 1
    generator = torch.Generator(GPU).manual_seed(0)
    tensors = [torch.randn(2, 4, 300, 64, device=GPU, dtype=dtype, generator=generator) for _ in range(3)]
    grad = torch.randn(2, 4, 300, 64, device=GPU, dtype=dtype, generator=generator)
    found = []
    for planted in (0.5, value):
        leaves = [x.clone() for x in tensors]
        leaves[place][0, :, 270] = planted  # padding
        leaves[place][1, :, 50] = planted  # seen by the first segment alone
        for x in leaves:
            x.requires_grad_()
        out, stats = attend(leaves, layout, segment_ids=ids, return_stats=True)
        gradients = torch.autograd.grad(out, leaves, grad)
        found.append(
            [x[1, :, 100:] for x in (out, stats.lse, *gradients)] + [x[0] for x in (out, *gradients)]
        )
    assert all(map(torch.equal, *found))
    assert all(x.isfinite().all() for x in found[0])


@pytest.mark.parametrize("dynamic", [False, None])
def test_compilers_make_one_graph(dynamic: bool | None) -> None:
    layout = HeadLayout.split(4, 1, 50)
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for length in (128, 200):
        leaves = [torch.randn(2, 4, length, 64, device=GPU, requires_grad=True) for _ in range(3)]
        grad = torch.randn(2, 4, length, 64, device=GPU)
        found, expected = (
            (out := run(leaves, layout), *torch.autograd.grad(out, leaves, grad))
            for run in (compiled, attend)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_packed", [False, True])
def test_nothing_waits_for_the_gpu(is_packed: bool) -> None:
    layout = HeadLayout((None, 30, 30), sink_tokens=3)
    leaves = [torch.randn(2, 3, 500, 64, device=GPU, requires_grad=True) for _ in range(3)]
    ids = torch.randint(-1, 3, (2, 500), device=GPU).sort().values if is_packed else None

    def step() -> None:
        out, stats = attend(leaves, layout, segment_ids=ids, return_stats=True)
        torch.autograd.grad(out.sum() + stats.lse.clamp(min=-9).sum(), leaves)

    step()  # compiles, and fills the table of windows
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_grows_with_the_length_alone() -> None:
    """Nothing of n×n: half precision, 131,072 tokens; one head of n×n would take 32 GiB."""
    layout = HeadLayout.split(12, 1, 128)
    shape = (1, 12, 131_072, 64)
    leaves = [torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    size = leaves[0].nbytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(leaves, layout)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 8 * size
    assert out.isfinite().all()


@pytest.mark.parametrize("seed", range(400, 406))
def test_flex_attention_agrees(seed: int) -> None:
    case = on_gpu(wide_case(seed, 64).cast(torch.float32))
    if case.q.shape[2] < 128:
        pytest.skip("FlexAttention has another kernel for a few queries, with its own limits")
    case.options.pop("sink_logits", None)
    ours = attention(case.q, case.k, case.v, case.layout, backend="triton", **case.options)
    theirs = attention(case.q, case.k, case.v, case.layout, backend="flex", **case.options)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_strides_and_lengths_beyond_32_bits() -> None:
    """Offsets of more than 2³¹ entries: 40 heads of 2²⁰ keys of 64."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("30 GiB are needed")
    layout = HeadLayout((64,) * 40)
    whole = torch.zeros(1, 40, 2**20, 64, device=GPU, dtype=torch.bfloat16)
    whole[:, :, -100:] = torch.randn(1, 40, 100, 64, device=GPU)
    out = attention(whole, whole, whole, layout, backend="triton")
    end = whole[:, :, -100:]
    expected = attention(end, end, end, layout, backend="triton")
    torch.testing.assert_close(out[:, :, -30:], expected[:, :, -30:])

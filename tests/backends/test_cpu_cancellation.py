"""Gradients of the C++ kernels where the terms of a row cancel: exactly, if it sees one key alone."""

import random

import pytest
import torch
from tests.attention_cases import Case, computed, plain, visibility
from tests.backends.test_cpu import run_python
from torch import Tensor

from longshort import HeadLayout, attention
from longshort.backends import cpu

HEAD_DIMS = [1, 2, 7, 8, 16, 17, 31, 33, 48, 64, 80, 127, 128, 200, 256]
# q_len, kv_len, window
LENGTHS = [(1, 1, None), (1, 1, 17), (1, 9, 1), (5, 5, 1), (79, 129, 1), (300, 300, 1)]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def check_single_keys(q_len: int, kv_len: int, window: int | None, head_dim: int, dtype: torch.dtype) -> None:
    """The one probability is 1, whatever the logit: nothing passes from out, and 1 from lse to the logit."""
    generator = torch.Generator().manual_seed(head_dim)
    q = 35 * normal(generator, 2, 6, q_len, head_dim)
    k, v = normal(generator, 2, 2, 2, kv_len, head_dim).unbind()
    q, k, v = leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    ids = torch.arange(kv_len).expand(2, -1) // 50
    out, stats = attention(
        q, k, v, HeadLayout((window,) * 6, 2), segment_ids=ids, backend="cpu", return_stats=True
    )
    grad_out, grad_lse = normal(generator, *out.shape).to(out.dtype), normal(generator, *stats.lse.shape)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    assert not grad_q.any()
    assert not grad_k.any()
    assert grad_v.any()
    grad_q, grad_k, _ = torch.autograd.grad((out, stats.lse), leaves, (grad_out, grad_lse))
    slope = head_dim**-0.5 * grad_lse.double()[..., None]
    of_q = slope * k.double().repeat_interleave(3, 1)[:, :, kv_len - q_len :]
    of_k = (slope * q.double()).unflatten(1, (2, 3)).sum(2)
    precision = 2 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (grad_q.double() - of_q).abs().max() <= precision * of_q.abs().max()
    assert (grad_k.double()[:, :, kv_len - q_len :] - of_k).abs().max() <= precision * of_k.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("q_len", "kv_len", "window"), LENGTHS)
def test_a_row_that_sees_one_key(
    q_len: int, kv_len: int, window: int | None, head_dim: int, dtype: torch.dtype
):
    check_single_keys(q_len, kv_len, window, head_dim, dtype)


def mean_errors(seeds: range, scale: float) -> dict[str, tuple[float, float]]:
    """The mean errors of the kernels and of plain PyTorch in each gradient, relative to its largest value.

    The calls are random, and their rows see two keys.
    """
    totals = dict.fromkeys("qkv", (0.0, 0.0))
    for seed in seeds:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        head_dim, length = rng.choice(HEAD_DIMS), rng.choice([2, 3, 40])
        q = scale * normal(generator, 1, 3, rng.choice([1, length]), head_dim)
        k, v = normal(generator, 2, 1, 1, length, head_dim).unbind()
        case = Case(q, k, v, HeadLayout((2,) * 3, 1))
        visible = visibility(case)
        truth = plain(case.cast(torch.float64), visible).gradients
        results = computed(case, "cpu").gradients, plain(case, visible).gradients
        for name, true, *both in zip("qkv", truth, *results, strict=True):
            ours, theirs = (((x - true).abs().max() / true.abs().max()).item() for x in both)
            totals[name] = totals[name][0] + ours, totals[name][1] + theirs
    return {name: (ours / len(seeds), theirs / len(seeds)) for name, (ours, theirs) in totals.items()}


@pytest.mark.parametrize("scale", [1.0, 35.0, 1000.0])
def test_rows_that_see_two_keys(scale: float):
    """On average, for a single call may be lucky, as plain PyTorch is."""
    for name, (ours, theirs) in mean_errors(range(60), scale).items():
        assert ours <= 2 * theirs, f"gradient of {name}: {ours:.3g}, plain PyTorch {theirs:.3g}"


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_each_instruction_set(name: str):
    code = """
from tests.backends.test_cpu_cancellation import *
for head_dim in HEAD_DIMS:
    for lengths in LENGTHS:
        check_single_keys(*lengths, head_dim, torch.float32)
test_rows_that_see_two_keys(35.0)
print(cpu.instruction_set())
"""
    assert run_python(code, LONGSHORT_CPU=name) == name

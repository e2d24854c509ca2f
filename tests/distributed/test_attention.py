"""Attention across ranks gives what one process computes for the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.cases import Case, on_one_process, random_case
from tests.processes import run_ranks
from torch import Tensor

from longshort import HeadLayout
from longshort.distributed import context_attention, take_part, visible_pairs


def attend_in_parts(case: Case) -> dict[str, Tensor]:
    """Compute this rank's part of what `on_one_process` computes."""
    cut: dict[str, Any] = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}
    q, k, v, weights = (take_part(x, dim=2, **cut).clone() for x in (case.q, case.k, case.v, case.weights))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = dict(case.options)
    if "sink_logits" in options:
        options["sink_logits"] = options["sink_logits"].clone().requires_grad_()
    ids = None if case.segment_ids is None else take_part(case.segment_ids, **cut)
    kept = {"segment_ids": ids, "gather_memory": case.gather_memory, "lend": case.lend}
    out, stats = context_attention(q, k, v, case.layout, return_stats=True, **kept, **options)
    plain = context_attention(q, k, v, case.layout, **kept, **options)
    assert torch.equal(out.nan_to_num(), plain.nan_to_num())
    lse = torch.where(stats.lse > -torch.inf, stats.lse, 0.0)
    ((out * weights).sum() + (lse * take_part(case.lse_weights, dim=2, **cut)).sum()).backward()
    found = {
        "out": out, "lse": stats.lse, "max_logit": stats.max_logit, "entropy": stats.entropy,
        "q": q.grad, "k": k.grad, "v": v.grad,
    }  # fmt: skip
    if "sink_logits" in options:
        dist.all_reduce(options["sink_logits"].grad)
        found["sink_logits"] = options["sink_logits"].grad
    return {name: x.detach() for name, x in found.items()}


def errors(seeds: range, dtype: torch.dtype) -> list[tuple[int, str, float, float]]:
    """Return the largest error of each case and tensor on this rank, relative to the largest number, and that
    of one process in the same precision."""
    found = []
    cut: dict[str, Any] = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}
    for seed in seeds:
        case = random_case(seed, dist.get_world_size(), dtype)
        wholes, plain = on_one_process(case), on_one_process(case, dtype)
        for name, part in attend_in_parts(case).items():
            whole = wholes[name]
            size = whole.nan_to_num(0, 0, 0).abs().max().clamp_min(1)
            usual = float((plain[name] - whole).abs().nan_to_num(0.0).max() / size)
            whole = take_part(whole, dim=2, **cut) if whole.ndim > 2 else whole
            difference = (part.double() - whole).abs().nan_to_num(0.0 if name == "lse" else torch.inf)
            found.append((seed, name, float(difference.max() / size), usual))
            assert torch.equal(part == -torch.inf, whole == -torch.inf), (seed, name)
    return found


@pytest.mark.parametrize(
    ("ranks", "dtype", "count"),
    [
        (2, torch.float64, 40),
        pytest.param(4, torch.float32, 40, marks=pytest.mark.slow),
        pytest.param(3, torch.float64, 400, marks=pytest.mark.slow),
        pytest.param(4, torch.float32, 400, marks=pytest.mark.slow),
    ],
)
def test_random_calls_equal_one_process(ranks: int, dtype: torch.dtype, count: int) -> None:
    results = run_ranks(errors, ranks, range(count), dtype, seconds=500)
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    worst = [entry for result in results for entry in result if not entry[2] <= max(limit, 2 * entry[3])]
    assert not worst, worst


def some_gradients() -> list[tuple[str, float]]:
    """Compute gradients of some tensors alone; return how far they are from those with all."""
    cut: dict[str, Any] = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}
    whole = torch.randn(3, 1, 4, 32, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = dict(zip("qkv", take_part(whole, dim=3, **cut), strict=True)) | {
        "sink_logits": torch.ones(4).double()
    }
    layout = HeadLayout((3, 3, None, None))

    def gradients(names: tuple[str, ...], **options: Any) -> list[Tensor]:
        tensors = {name: x.clone().requires_grad_(name in names) for name, x in parts.items()}
        q, k, v, sink_logits = tensors.values()
        out = context_attention(q, k, v, layout, sink_logits=sink_logits, **options)
        out.sin().sum().backward()
        return [x.grad for x in tensors.values() if x.grad is not None]

    found = []
    for options in ({}, {"gather_memory": 0}):
        expected = dict(zip(parts, gradients(tuple(parts), **options), strict=True))
        for names in (("q",), ("k",), ("v",), ("sink_logits",), ("k", "sink_logits")):
            for name, gradient in zip(names, gradients(names, **options), strict=True):
                found.append((f"{name} of {names}", float((gradient - expected[name]).abs().max())))
    return found


def test_gradients_of_some_tensors_alone() -> None:
    """Some ranks send nothing that needs gradients, and still take part in the backward pass."""
    for found in run_ranks(some_gradients, 4):
        assert all(error < 1e-12 for _, error in found), found


def empty_calls() -> None:
    for batch, part in ((0, 3), (2, 0)):
        q = torch.randn(batch, 2, part, 4, requires_grad=True)
        ids = torch.zeros(batch, part, dtype=torch.int64)
        out = context_attention(q, q, q, HeadLayout((2, None)), segment_ids=ids)
        assert out.shape == q.shape


def test_empty_batches_and_sequences() -> None:
    run_ranks(empty_calls, 2)


def half_errors() -> dict[str, tuple[float, float]]:
    """Return the largest errors in bfloat16 across ranks, and those of plain PyTorch on one process."""
    cut: dict[str, Any] = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 1, 4, 128, 16, generator=generator, dtype=torch.float64).bfloat16()
    layout = HeadLayout((9, 9, None, None))
    seen = visible_pairs(layout, 128)

    def of(function: Any, tensors: Any, weights: Tensor) -> list[Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out = function(q, k, v)
        out.backward(weights)
        return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v

    truth = of(plain, whole[:3].double(), whole[3].double())
    usual = of(plain, whole[:3], whole[3])
    *tensors, weights = take_part(whole, dim=3, **cut)
    ours = of(lambda q, k, v: context_attention(q, k, v, layout), tensors, weights)
    return {
        name: (
            float((mine.double() - take_part(one, dim=2, **cut)).abs().max()),
            float((other.double() - one).abs().max()),
        )
        for name, mine, other, one in zip(("out", "q", "k", "v"), ours, usual, truth, strict=True)
    }


def test_half_precision_errs_at_most_twice_as_much_as_plain_pytorch() -> None:
    for found in run_ranks(half_errors, 4):
        assert all(mine <= 2 * usual for mine, usual in found.values()), found


def autocast_statistics() -> tuple[Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(dist.get_rank())).mul(3)
    found = []
    for options in ({}, {"gather_memory": 0}):
        with torch.autocast("cpu", torch.bfloat16):
            _, stats = context_attention(q, k, v, HeadLayout((None, None)), return_stats=True, **options)
        found.append(torch.cat([stats.max_logit, stats.entropy]))
    return found[0], found[1]


def test_statistics_of_a_ring_are_precise_under_autocast() -> None:
    for gathered, ring in run_ranks(autocast_statistics, 2):
        torch.testing.assert_close(ring, gathered, rtol=1e-4, atol=1e-4)

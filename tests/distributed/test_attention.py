"""Attention across ranks gives what one process computes for the whole sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.cases import Case, on_one_process, random_case
from tests.distributed.processes import run_ranks
from torch import Tensor

from longshort.distributed import context_attention, take_part


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
        (4, torch.float32, 40),
        pytest.param(3, torch.float64, 400, marks=pytest.mark.slow),
        pytest.param(4, torch.float32, 400, marks=pytest.mark.slow),
    ],
)
def test_random_calls_equal_one_process(ranks: int, dtype: torch.dtype, count: int, tmp_path: Path) -> None:
    results = run_ranks(errors, ranks, tmp_path, range(count), dtype, seconds=500 if count > 40 else 100)
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    worst = [entry for result in results for entry in result if not entry[2] <= max(limit, 2 * entry[3])]
    assert not worst, worst

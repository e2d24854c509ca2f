"""Random calls of attention over a sequence, and what one process computes for them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from longshort import HeadLayout, attention


@dataclass
class Case:
    """A call over a whole sequence, to be cut across ranks."""

    layout: HeadLayout
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    """Of the output in what is differentiated."""
    lse_weights: Tensor
    segment_ids: Tensor | None
    gather_memory: int | None
    lend: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.q.shape[2]


def random_case(seed: int, ranks: int, dtype: torch.dtype = torch.float64) -> Case:
    """Draw a call whose length `ranks` divides, padding included."""
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    kv_heads, group_size = random.choice([1, 2, 3, 4]), random.choice([1, 1, 2])
    heads, dim, batch = kv_heads * group_size, random.choice([1, 4, 8, 16]), random.choice([1, 1, 2])
    part = random.choice([1, 2, 7, 16, 33, 64])
    length = part * ranks
    choices = [
        None,
        None,
        1,
        2,
        3,
        part,
        part + 1,
        2 * part + 1,
        random.randint(1, length),
        length,
        length + 5,
    ]
    windows = [random.choice(choices) for _ in range(kv_heads)]
    kind = random.random()
    if kind < 0.15:
        windows = [None] * kv_heads
    elif kind < 0.3:
        windows = [w or 3 for w in windows]
    sinks = random.choice([0, 0, 0, 1, 2, 5])
    layout = HeadLayout(tuple(w for w in windows for _ in range(group_size)), kv_heads, sinks)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (
        draw(batch, heads, length, dim),
        draw(batch, kv_heads, length, dim),
        draw(batch, kv_heads, length, dim),
    )
    options: dict[str, Any] = {}
    if random.random() < 0.3:
        options["softcap"] = random.choice([1.0, 5.0])
    if random.random() < 0.3:
        options["sink_logits"] = draw(heads)
    if random.random() < 0.3:
        options["scale"] = 0.7
    has_alibi = not sinks and random.random() < 0.3
    if has_alibi:
        options["alibi_slopes"] = torch.rand(heads, generator=generator).double()
    uses_ring = not has_alibi and random.random() < 0.25
    return Case(
        layout, q, k, v, draw(batch, heads, length, dim), draw(batch, heads, length),
        _segments(random, generator, batch, length), 0 if uses_ring else None, random.random() < 0.8, options,
    )  # fmt: skip


def _segments(random: Random, generator: torch.Generator, batch: int, length: int) -> Tensor | None:
    kind = random.choice(["none", "none", "packed", "packed", "alike", "runs", "padded", "padding"])
    if kind == "none":
        return None
    if kind == "runs":
        runs = torch.randint(-1, 3, (batch, length), generator=generator)
        return runs.repeat_interleave(random.choice([1, 3]), 1)[:, :length]
    if kind == "padding":
        return torch.full((batch, length), -1)
    rate = random.choice([0.02, 0.1, 0.5])
    rows = 1 if kind == "alike" else batch
    ids = (
        (torch.rand(rows, length, generator=generator) < rate).long().cumsum(1).expand(batch, length).clone()
    )
    if kind == "padded":
        ids[:, random.randint(0, length) :] = -1
        ids[:, : random.randint(0, max(1, length // 3))] = -1
    return ids


def on_one_process(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Compute output, statistics and gradients on one process."""
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in (case.q, case.k, case.v))
    options = dict(case.options)
    if "sink_logits" in options:
        options["sink_logits"] = options["sink_logits"].detach().to(dtype, copy=True).requires_grad_()
    out, stats = attention(
        q, k, v, case.layout, segment_ids=case.segment_ids, return_stats=True, backend="reference", **options
    )
    lse = torch.where(stats.lse > -torch.inf, stats.lse, 0.0)
    ((out * case.weights.to(dtype)).sum() + (lse * case.lse_weights.to(dtype)).sum()).backward()
    found = {
        "out": out, "lse": stats.lse, "max_logit": stats.max_logit, "entropy": stats.entropy,
        "q": q.grad, "k": k.grad, "v": v.grad,
    }  # fmt: skip
    if "sink_logits" in options:
        found["sink_logits"] = options["sink_logits"].grad
    return {name: x.detach() for name, x in found.items()}

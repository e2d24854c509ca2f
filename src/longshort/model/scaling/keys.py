"""What context parallelism sends in one layer, and how evenly it shares the work.

Ours is counted by `longshort.distributed`, whose plan the ranks follow. MHSA has two baselines. Both are
taken as even, as they are if each rank holds an early and a late part of one document (head and tail):

- all-gather: every rank gets the keys and values of all heads, 2·B·D·e·(n/C)·(C - 1) bytes for each KV head,
  and sends as many gradients back (Llama 3, arXiv 2407.21783, section 3.3.2).
- ring: keys and values of a part go on from rank to rank C - 1 times, as many bytes; in the backward pass
  they go round again, with their gradients (Liu et al. 2023, arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

from longshort.distributed import ContextPlan, all_gather_bytes, layer_traffic, plan_context
from longshort.layout import HeadLayout
from longshort.model.scaling.setup import TrainingSetup


@dataclass(frozen=True)
class KeyTraffic:
    """Bytes that one rank sends for attention, mean over the ranks.

    Attributes:
        halo: keys and values that local heads see across a border.
        sinks: keys and values of sink tokens before the halo.
        gather: keys and values of global heads, or of all.
        lent: queries of global heads that other ranks take over, and their outputs.
        ring: keys and values that are passed on from rank to rank.
    """

    halo: float = 0
    sinks: float = 0
    gather: float = 0
    lent: float = 0
    ring: float = 0

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))

    def times(self, count: float) -> KeyTraffic:
        """Multiply each number by `count`."""
        return KeyTraffic(*(count * getattr(self, field.name) for field in fields(self)))

    def plus(self, other: KeyTraffic) -> KeyTraffic:
        """Add the numbers of another, kind by kind."""
        return KeyTraffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def key_traffic(setup: TrainingSetup, layout: HeadLayout, *, backward: bool = False) -> KeyTraffic:
    """Count what one rank sends in one layer for one sequence, forward or backward."""
    ranks, length = setup.context_parallel, setup.context_parallel * setup.part
    if ranks == 1:
        return KeyTraffic()
    sizes = (setup.config.head_dim, setup.attention_size, length, ranks)
    if setup.exchange == "all-gather":
        return KeyTraffic(gather=all_gather_bytes(layout, *sizes))
    if setup.exchange == "ring":
        return KeyTraffic(ring=(2 if backward else 1) * all_gather_bytes(layout, *sizes))
    lent_rows = context_plan(setup).lent_rows if layout.global_heads else 0
    found = layer_traffic(layout, *sizes, lent_rows=lent_rows)
    return KeyTraffic(found.halo, found.sinks, found.gather, found.lent)


def imbalance(setup: TrainingSetup) -> float:
    """Return the most visible pairs of the global heads that a rank computes, over the mean."""
    return context_plan(setup).imbalance if setup.exchange == "long-short" else 1.0


def context_plan(setup: TrainingSetup) -> ContextPlan:
    """Return the plan of one sequence, one document."""
    return _plan(setup.context_parallel, setup.context_parallel * setup.part)


@lru_cache(maxsize=64)
def _plan(ranks: int, length: int) -> ContextPlan:
    return plan_context(ranks, length)


def borrowed_rows(plan: ContextPlan) -> int:
    """Return the most queries of one head and one sequence that a rank computes for others."""
    rows = [0] * plan.ranks
    for block in plan.blocks:
        rows[block.borrower] += block.count
    return max(rows)

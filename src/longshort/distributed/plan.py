"""The plan of one sequence across ranks: pure arithmetic, the same on every rank.

Each rank keeps one contiguous part. Local heads need a halo of earlier keys, the same work everywhere.
Queries of global heads see more the later they are, so ranks with more than their share lend blocks of these
queries to ranks with less, which hold all keys of global heads anyway. Work is counted in visible pairs of a
query and a key, exactly.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longshort.attention import require_tensor
from longshort.checks import require_integer
from longshort.distributed.costs import Traffic
from longshort.distributed.segments import Runs
from longshort.layout import HeadGroup, HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Int

_UNITS = 128  # blocks of queries per part, between which lending chooses
_SHARES = 64  # a unit has at most this part of the mean work, or is one row
_LEVELS = 8  # of the work per row; units of one level are lent in the order of the sequence
_TOLERANCE = 0.01  # of the mean work


class Block(NamedTuple):
    """Queries of the global heads that one rank lends to another.

    Attributes:
        lender: rank whose part holds them.
        borrower: rank that computes their attention.
        rows: rows of the batch, (first, end).
        start, end: positions in the sequence, `end` not included.
    """

    lender: int
    borrower: int
    rows: tuple[int, int]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Queries of one head."""
        return (self.rows[1] - self.rows[0]) * (self.end - self.start)


class Span(NamedTuple):
    """Queries of the global heads that are computed in one call.

    Attributes:
        rows: rows of the batch, (first, end).
        start, end: positions of the queries.
        first_key: position of the first key that they may see; they see none from `end` on.
    """

    rows: tuple[int, int]
    start: int
    end: int
    first_key: int


class Halo(NamedTuple):
    """The earlier keys that the local heads of one window need on one rank.

    Attributes:
        start: position of the first of the keys just before the part.
        sinks: for each row of the batch the positions of sink tokens before `start`, in order.
    """

    start: int
    sinks: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> int:
        """Sink keys of each row, with padding where a row has fewer than another."""
        return max((len(row) for row in self.sinks), default=0)


@dataclass(frozen=True)
class ContextPlan:
    """The cut of a batch of sequences across ranks, and the queries that ranks lend each other.

    Attributes:
        ranks: number of parts.
        part: tokens of a part.
        batch: sequences.
        segment_ids: (batch, ranks · part), int64 on the CPU; None: one segment without padding.
        blocks: lent queries.
        pairs_before: visible pairs of a global head by rank, if every rank computed its own queries.
        pairs: the same with lending.
        digest: a number that tells other segment ids apart, with few exceptions.
    """

    ranks: int
    part: int
    batch: int
    segment_ids: Int[Tensor, "batch padded"] | None
    blocks: tuple[Block, ...]
    pairs_before: tuple[int, ...]
    pairs: tuple[int, ...]
    digest: int
    _runs: Runs = field(repr=False, compare=False)
    _halos: dict[Any, Halo] = field(default_factory=dict, repr=False, compare=False)
    _spans: dict[int, list[Span]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def length(self) -> int:
        """Tokens of all parts, padding included."""
        return self.ranks * self.part

    @property
    def imbalance(self) -> float:
        """The most visible pairs of a rank over the mean, with lending."""
        return _imbalance(self.pairs)

    @property
    def imbalance_before(self) -> float:
        """The same without lending."""
        return _imbalance(self.pairs_before)

    @property
    def lent_rows(self) -> int:
        """Queries of one head that are lent, of all ranks together."""
        return sum(block.count for block in self.blocks)

    def without_lending(self) -> ContextPlan:
        """Return the plan in which each rank computes its own queries."""
        return replace(self, blocks=(), pairs=self.pairs_before, _spans={})

    def spans(self, rank: int) -> list[Span]:
        """Return the queries of its own part that a rank computes itself."""
        if rank not in self._spans:
            self._spans[rank] = self._own_spans(rank)
        return self._spans[rank]

    def borrowed(self, rank: int) -> list[Span]:
        """Return the queries that a rank computes for others, in the order of `blocks`."""
        return [
            self._span(block.rows, block.start, block.end) for block in self.blocks if block.borrower == rank
        ]

    def halo(self, group: HeadGroup, sink_tokens: int, rank: int) -> Halo:
        """Return the earlier keys that the heads of a group with a window need on a rank."""
        assert group.window is not None
        key = group.window, sink_tokens, rank
        if key not in self._halos:
            begin = rank * self.part
            start = max(0, begin - (group.window - 1))
            sinks = tuple(self._sinks(row, rank, start, sink_tokens) for row in range(self.batch))
            self._halos[key] = Halo(start, sinks)
        return self._halos[key]

    def traffic(self, layout: HeadLayout, head_dim: int, itemsize: int) -> list[Traffic]:
        """Count the bytes that each rank sends in one layer's forward pass; the backward pass sends as many.

        The few bytes by which ranks compare their calls, and statistics, are left out.
        """
        found = []
        size = head_dim * itemsize
        halo, sinks = [0] * self.ranks, [0] * self.ranks
        for group in layout.groups:
            if group.window is None:
                continue
            key_bytes = 2 * len(group.kv_heads) * size
            for rank in range(self.ranks):
                needed = self.halo(group, layout.sink_tokens, rank)
                for other in range(rank):
                    end = min((other + 1) * self.part, rank * self.part)
                    halo[other] += self.batch * max(0, end - max(needed.start, other * self.part)) * key_bytes
                for position in (position for row in needed.sinks for position in row):
                    sinks[position // self.part] += key_bytes
        kv_heads = sum(len(group.kv_heads) for group in layout.groups if group.window is None)
        gather = 2 * kv_heads * self.batch * self.part * size * (self.ranks - 1)
        for rank in range(self.ranks):
            lent = sum(block.count for block in self.blocks if rank in (block.lender, block.borrower))
            queries = lent * len(layout.global_heads) * size
            found.append(Traffic(halo=halo[rank], sinks=sinks[rank], gather=gather, lent=queries))
        return found

    def _own_spans(self, rank: int) -> list[Span]:
        begin, end = rank * self.part, (rank + 1) * self.part
        lent = defaultdict(list)
        for block in self.blocks:
            if block.lender == rank:
                lent[block.rows].append((block.start, block.end))
        rows = list(lent) or [(0, self.batch)]
        if rows[0] != (0, self.batch):
            rows = [(row, row + 1) for row in range(self.batch)]
        spans = []
        for row in rows:
            at = begin
            for start, stop in [*sorted(lent[row]), (end, end)]:
                if start > at:
                    spans.append(self._span(row, at, start))
                at = stop
        return spans

    def _span(self, rows: tuple[int, int], start: int, end: int) -> Span:
        n = self.length
        if self.segment_ids is None:
            return Span(rows, start, end, 0)
        firsts = [self._runs.first_key(row * n + start, row * n + end) - row * n for row in range(*rows)]
        return Span(rows, start, end, min(firsts))

    def _sinks(self, row: int, rank: int, end: int, count: int) -> tuple[int, ...]:
        """Return the positions before `end` of the sink tokens of the segments in a rank's part."""
        if not count or end <= 0:
            return ()
        if self.segment_ids is None:
            return tuple(range(min(count, end)))
        runs, base = self._runs, row * self.length
        own = runs.overlapping(base + rank * self.part, base + (rank + 1) * self.part)
        reach_back = (runs.ids[own] >= 0) & (runs.first[own] < base + end)
        found: list[int] = []
        for segment in torch.unique(runs.ids[own][reach_back]).tolist():
            found.extend(runs.first_tokens(segment, row, count, base + end))
        return tuple(sorted(position - base for position in found))


def plan_context(
    ranks: int,
    length: int,
    *,
    batch: int = 1,
    segment_ids: Int[Tensor, "batch padded"] | None = None,
    lend: bool = True,
) -> ContextPlan:
    """Plan how a batch of sequences is cut across ranks.

    Args:
        ranks: number of ranks, >= 1.
        length: tokens of all parts together, padding included: a multiple of `ranks`.
        batch: sequences.
        segment_ids: the segments of all tokens, on the CPU; negative is padding. None: one segment, no
            padding.
        lend: let ranks lend queries of global heads; without it each computes its own.

    Raises:
        TypeError: segment_ids is not a tensor.
        ValueError: an argument is out of its range; the message names it.
    """
    for name, value, minimum in (("ranks", ranks, 1), ("length", length, 0), ("batch", batch, 0)):
        require_integer(name, value, minimum)
    if length % ranks:
        raise ValueError(f"length must be a multiple of the {ranks} ranks, padding included, got {length}")
    if segment_ids is not None:
        require_tensor("segment_ids", segment_ids)
        is_integer = not (segment_ids.is_floating_point() or segment_ids.is_complex())
        if tuple(segment_ids.shape) != (batch, length) or not is_integer or segment_ids.dtype == torch.bool:
            raise ValueError(
                f"segment_ids must be integers, (batch, length) = {(batch, length)}, got "
                f"{tuple(segment_ids.shape)} of {segment_ids.dtype}"
            )
        segment_ids = segment_ids.cpu().to(torch.int64)
    is_alike = segment_ids is None or batch < 2 or bool((segment_ids == segment_ids[:1]).all())
    counted = torch.zeros(1, length, dtype=torch.int64) if segment_ids is None else segment_ids
    runs = Runs.of(counted)
    worked = Runs.of(counted[:1]) if is_alike and segment_ids is not None else runs
    copies = batch if is_alike else 1
    blocks, before, after = (
        _lend(worked, ranks, length // ranks, copies, lend)
        if length and batch
        else ((), (0,) * ranks, (0,) * ranks)
    )
    digest = 0 if segment_ids is None else 1 + hash((runs.sequence, *runs.start.tolist(), *runs.ids.tolist()))
    return ContextPlan(ranks, length // ranks, batch, segment_ids, blocks, before, after, digest, runs)


def _lend(
    runs: Runs, ranks: int, part: int, copies: int, lend: bool
) -> tuple[tuple[Block, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the blocks to lend, and the pairs of each rank before and after.

    Args:
        copies: sequences of the batch that each row of `runs` stands for: all of them if they are alike.
    """
    starts, work = _units(runs, ranks, part)
    owner = (starts % runs.sequence) // part
    loads = torch.zeros(ranks, dtype=torch.int64).index_add_(0, owner, work).tolist()
    before = tuple(copies * load for load in loads)
    mean = sum(loads) / ranks
    borrower_of: dict[int, int] = {}
    if lend and mean:
        ends = torch.cat([starts[1:], torch.tensor([len(runs.start) and _total(runs)])])
        per_row = work.double() / (ends - starts).clamp_min(1)
        donors = sorted((r for r in range(ranks) if loads[r] > mean), key=lambda r: -loads[r])
        for donor in donors:
            units = (owner == donor).nonzero()[:, 0]
            heaviest = per_row[units].max().clamp_min(1)
            level = (per_row[units] * _LEVELS / heaviest).long()
            order = units[(-level).argsort(stable=True)].tolist()
            _give(order, work, donor, loads, mean, borrower_of)
    blocks = _merged(borrower_of, starts, owner, _total(runs), runs.sequence, part, copies)
    return blocks, before, tuple(copies * load for load in loads)


def _give(
    units: list[int], work: Tensor, donor: int, loads: list[int], mean: float, borrower_of: dict[int, int]
) -> None:
    """Give units of a donor, in their order, to ranks with room for them, until it has the mean left."""
    slack = _TOLERANCE * mean
    sizes = work[torch.tensor(units, dtype=torch.int64)].tolist()
    borrower = -1
    for unit, size in zip(units, sizes, strict=True):
        if loads[donor] - mean <= slack:
            return
        if not size or size > loads[donor] - mean + slack:
            continue
        if borrower < 0 or loads[borrower] + size > mean + slack:
            borrower = min(range(len(loads)), key=loads.__getitem__)
            if loads[borrower] + size > mean + slack:
                continue  # a smaller unit may fit
        loads[borrower] += size
        loads[donor] -= size
        borrower_of[unit] = borrower


def _units(runs: Runs, ranks: int, part: int) -> tuple[Tensor, Tensor]:
    """Cut all parts into units of queries; return where they start, and their visible pairs."""
    total = _total(runs)
    step = -(-part // _UNITS)
    offsets = torch.arange(0, part, step)
    bounds = (torch.arange(0, total, part)[:, None] + offsets).flatten()
    pairs = int(runs.pairs[-1])
    share = pairs // (ranks * _SHARES)
    if share:
        bounds = torch.cat([bounds, runs.position_of(torch.arange(share, pairs, share))])
    bounds = torch.unique(bounds[bounds < total])
    counted = runs.pairs_before(bounds)
    return bounds, torch.diff(counted, append=runs.pairs[-1:])


def _merged(
    borrower_of: dict[int, int],
    starts: Tensor,
    owner: Tensor,
    total: int,
    sequence: int,
    part: int,
    copies: int,
) -> tuple[Block, ...]:
    """Merge adjacent units of one lender and borrower into blocks."""
    bounds, owners = [*starts.tolist(), total], owner.tolist()
    blocks: list[Block] = []
    last = -2
    for unit in sorted(borrower_of):
        row, start = divmod(bounds[unit], sequence)
        end = bounds[unit + 1] - row * sequence
        rows = (0, copies) if copies > 1 else (row, row + 1)
        block = Block(owners[unit], borrower_of[unit], rows, start, end)
        if unit == last + 1 and blocks[-1][:3] == block[:3] and start % part:
            block = block._replace(start=blocks.pop().start)
        blocks.append(block)
        last = unit
    return tuple(blocks)


def _total(runs: Runs) -> int:
    return int(runs.start[-1] + runs.length[-1])


def _imbalance(pairs: tuple[int, ...]) -> float:
    mean = sum(pairs) / len(pairs)
    return max(pairs) / mean if mean else 1.0

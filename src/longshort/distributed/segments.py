"""The segments of a sequence as runs of equal ids: who sees how many keys, counted without an n×n mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class Runs:
    """The runs of equal ids of a batch of sequences, laid end to end: position p of row b is at b·n + p.

    A causal query at offset o of a run sees `before + o + 1` keys: those of earlier runs of its segment, and
    of its own run up to itself. All tensors are int64 on the CPU, with an entry per run.

    Attributes:
        start: where the run begins.
        length: its tokens.
        ids: its segment, negative for padding.
        before: tokens of its segment in earlier runs.
        first: where its segment begins.
        pairs: visible pairs of all queries before the run; one more entry for all of them.
        sequence: n, the length of a row.
    """

    start: Int[Tensor, " runs"]
    length: Int[Tensor, " runs"]
    ids: Int[Tensor, " runs"]
    before: Int[Tensor, " runs"]
    first: Int[Tensor, " runs"]
    pairs: Int[Tensor, " runs_plus_1"]
    sequence: int

    @classmethod
    def of(cls, segment_ids: Int[Tensor, "batch sequence"]) -> Runs:
        """Find the runs of ids on the CPU, in O(batch · sequence)."""
        batch, sequence = segment_ids.shape
        flat = segment_ids.reshape(-1).to(torch.int64)
        begins = torch.ones(len(flat), dtype=torch.bool)
        torch.ne(flat[1:], flat[:-1], out=begins[1:])
        begins[:: max(1, sequence)] = True
        start = begins.nonzero()[:, 0]
        length = torch.diff(start, append=torch.tensor([batch * sequence]))
        ids = flat[start]
        before, first = _earlier_runs(ids, start // max(1, sequence), start, length)
        pairs = torch.where(ids < 0, 0, before * length + length * (length + 1) // 2)
        return cls(
            start, length, ids, before, first, torch.cat([pairs.new_zeros(1), pairs.cumsum(0)]), sequence
        )

    def pairs_before(self, positions: Tensor) -> Tensor:
        """Count the visible pairs of all queries before each position."""
        run = torch.searchsorted(self.start, positions, right=True) - 1
        offset = positions - self.start[run]
        inside = self.before[run] * offset + offset * (offset + 1) // 2
        return self.pairs[run] + torch.where(self.ids[run] < 0, 0, inside)

    def position_of(self, pairs: Tensor) -> Tensor:
        """Find, for each number of pairs below all, a position before which about as many are visible, to a
        row or two."""
        run = torch.searchsorted(self.pairs, pairs, right=True) - 1
        run.clamp_(max=len(self.start) - 1)
        half = self.before[run].double() + 0.5
        left = (pairs - self.pairs[run]).double()
        offset = (half.square() + 2 * left).sqrt() - half  # before·x + x(x + 1)/2 = left
        return self.start[run] + torch.minimum(offset.round().long(), self.length[run])

    def overlapping(self, start: int, end: int) -> slice:
        """Return which runs have tokens at positions start ... end - 1."""
        bounds = torch.tensor([start, end - 1])
        low, high = torch.searchsorted(self.start, bounds, right=True).tolist()
        return slice(low - 1, high) if start < end else slice(0, 0)

    def first_key(self, start: int, end: int) -> int:
        """Return the first position that a query at start ... end - 1 sees; start if none sees anything."""
        runs = self.overlapping(start, end)
        is_token = self.ids[runs] >= 0
        if not is_token.any():
            return start
        return min(start, int(self.first[runs][is_token].min()))

    def first_tokens(self, segment: int, row: int, count: int, end: int) -> list[int]:
        """Return the positions of the first `count` tokens of a row's segment that lie before `end`."""
        found: list[int] = []
        runs = self.overlapping(row * self.sequence, end)
        for index in (self.ids[runs] == segment).nonzero()[:, 0].tolist():
            begin = int(self.start[runs][index])
            stop = min(begin + int(self.length[runs][index]), end, begin + count - len(found))
            found.extend(range(begin, stop))
            if len(found) >= count:
                break
        return found


def _earlier_runs(ids: Tensor, row: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each run the tokens of its segment before it, and where its segment begins."""
    is_token = ids >= 0
    tokens, rows = ids[is_token], row[is_token]
    rises = (tokens[1:] > tokens[:-1]) | (rows[1:] != rows[:-1])
    before, first = torch.zeros_like(start), start.clone()
    if bool(rises.all()):  # as packing makes them: no segment has two runs
        return before, first
    dense = torch.unique(ids, return_inverse=True)[1]
    key = dense * (row.max() + 1) + row
    order = key.argsort(stable=True)
    sorted_key, sorted_length = key[order], length[order]
    ends = sorted_length.cumsum(0)
    is_first = torch.ones(len(key), dtype=torch.bool)
    torch.ne(sorted_key[1:], sorted_key[:-1], out=is_first[1:])
    head = is_first.nonzero()[:, 0][is_first.cumsum(0) - 1]  # the first run of the segment of each run
    before[order] = ends - sorted_length - (ends - sorted_length)[head]
    first[order] = start[order][head]
    return before, first

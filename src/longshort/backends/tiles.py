"""The division of attention with one window into tiles, and the bookkeeping of one tile.

Shapes inside a tile: rows are (batch, kv_heads, blocks, group·size, head_dim), scores are
(batch, kv_heads, blocks, group, size, columns), where `group` query heads share a key/value head and `size`
queries make a block. The columns are the sink keys outside the window, then the window's keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores per tile: few enough to stay in a processor's cache, many enough to hide the cost of a call.
_TILE_SCORES = 2**19

# Dimensions of (batch, kv_heads, blocks, group, size, dim) to reduce for one number per query head.
ALL_BUT_HEADS = (0, 2, 4, 5)


def accumulation_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of scores and sums: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """Attention of heads that share one window; the fields are those of `AttentionCall`."""

    q: Tensor
    k: Tensor
    alibi_slopes: Tensor | None
    segment_ids: Tensor | None
    window: int | None
    sink_tokens: int
    causal: bool
    scale: float
    softcap: float | None

    @cached_property
    def masks(self) -> dict[tuple[int, int], Tensor]:
        """The masks of hidden pairs of tiles inside the sequence, by their number and size of blocks."""
        return {}

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def sinks(self) -> int:
        """Sink columns of a tile."""
        return 0 if self.window is None else min(self.sink_tokens, self.k.shape[2])

    def block_size(self) -> int:
        """Return the queries per block: a local block computes size + window - 1 columns to use `window`."""
        if self.window is None:
            return max(16, min(128, _TILE_SCORES // (self.group_size * self.k.shape[2])))
        return 32 if self.window <= 48 else 64 if self.window <= 256 else 128

    def span(self, size: int) -> int:
        """Return the most keys that `size` consecutive queries see together."""
        if self.window is None:
            return self.k.shape[2]
        return size + (self.window - 1) * (1 if self.causal else 2)

    def columns(self, size: int) -> int:
        """Return the most numbers per row of a tile whose blocks have `size` queries."""
        # with segments each row gathers its own sink keys
        per_sink = 1 if self.segment_ids is None else self.q.shape[3]
        return self.span(size) + self.sinks * per_sink

    def rows_that_see(self) -> Tensor | int:
        """Return the number of query rows per head that see something, at least 1."""
        if self.segment_ids is None:
            return self.q.shape[0] * self.q.shape[2]
        return (self.segment_ids[:, -self.q.shape[2] :] >= 0).sum().clamp(min=1)

    def parts(self) -> Iterator[Part]:
        """Yield slices of batch and heads that are so small that one block of each fits a tile."""
        batch, kv_heads = self.k.shape[:2]
        size = self.block_size()
        planes = max(1, _TILE_SCORES // (self.group_size * size * self.columns(size)))
        head_step = min(planes, kv_heads)
        batch_step = max(1, planes // kv_heads)
        for b in range(0, batch, batch_step):
            for h in range(0, kv_heads, head_step):
                yield Part(self, slice(b, min(b + batch_step, batch)), slice(h, min(h + head_step, kv_heads)))


@dataclass(frozen=True)
class Part:
    """Some sequences and heads of a problem."""

    problem: Problem
    batch: slice
    kv_heads: slice

    def queries(self, x: Tensor, convert: bool = True) -> Tensor:
        """Return (batch, kv_heads, group, q_len, dim) of a tensor with query heads: a view, or converted."""
        group = self.problem.group_size
        heads = slice(self.kv_heads.start * group, self.kv_heads.stop * group)
        view = x[self.batch, heads].unflatten(1, (-1, group))
        return view.to(accumulation_dtype(x)) if convert else view

    def keys(self, x: Tensor, convert: bool = True) -> Tensor:
        """Return (batch, kv_heads, kv_len, dim) of a tensor with key/value heads: a view, or converted."""
        view = x[self.batch, self.kv_heads]
        return view.to(accumulation_dtype(x)) if convert else view

    def heads_of(self, per_head: Tensor) -> Tensor:
        """Return (kv_heads, group) of a tensor (heads,), as a view."""
        return per_head.view(-1, self.problem.group_size)[self.kv_heads]

    @cached_property
    def segment_ids(self) -> Tensor | None:
        """(batch, kv_len)."""
        ids = self.problem.segment_ids
        return None if ids is None else ids[self.batch]

    @cached_property
    def sink_positions(self) -> Tensor | None:
        """(batch, q_len, sinks) positions of the sink keys of each query's segment, -1 where it has fewer.

        None without segments: the sink keys are then the first of the sequence.
        """
        ids, sinks = self.segment_ids, self.problem.sinks
        if ids is None or sinks == 0:
            return None
        sorted_ids, order = torch.sort(ids, dim=-1, stable=True)
        query_ids = ids[:, -self.problem.q.shape[2] :].contiguous()
        first = torch.searchsorted(sorted_ids, query_ids)
        place = first[..., None] + torch.arange(sinks, device=ids.device)
        inside = place.clamp(max=ids.shape[1] - 1).flatten(1)
        same = (sorted_ids.gather(1, inside).view_as(place) == query_ids[..., None]) & (place < ids.shape[1])
        return torch.where(same, order.gather(1, inside).view_as(place), -1)

    def tiles(self) -> Iterator[Tile]:
        """Yield tiles that cover all queries once."""
        problem = self.problem
        q_len, kv_len = problem.q.shape[2], problem.k.shape[2]
        planes = (self.batch.stop - self.batch.start) * (self.kv_heads.stop - self.kv_heads.start)
        row = 0
        while row < q_len:
            size = min(problem.block_size(), q_len - row)
            position = kv_len - q_len + row
            if problem.window is None:
                yield Tile(self, row, 1, size, 0, position + size if problem.causal else kv_len)
                row += size
                continue
            span = problem.span(size)
            scores = planes * problem.group_size * size * problem.columns(size)
            blocks = max(1, min((q_len - row) // size, _TILE_SCORES // scores))
            yield Tile(self, row, blocks, size, position - problem.window + 1, span)
            row += blocks * size


@dataclass(frozen=True)
class Tile:
    """`blocks` runs of `size` queries from `row`; block b sees keys start + b·size ... + span - 1."""

    part: Part
    row: int
    blocks: int
    size: int
    start: int
    span: int

    @property
    def _stop(self) -> int:
        """One past the last key of the last window."""
        return self.start + (self.blocks - 1) * self.size + self.span

    # -- rows

    def rows_of(self, x: Tensor) -> Tensor:
        """Return the tile's rows (…, blocks, group·size, dim) of (batch, kv_heads, group, q_len, dim)."""
        rows = x[:, :, :, self.row : self.row + self.blocks * self.size]
        return rows.unflatten(3, (self.blocks, self.size)).transpose(2, 3).flatten(3, 4)

    def split_rows(self, rows: Tensor) -> Tensor:
        """Reshape (…, group·size, dim) -> (…, group, size, dim)."""
        return rows.unflatten(3, (-1, self.size))

    def write_rows(self, x: Tensor, rows: Tensor) -> None:
        """Write rows to x: the inverse of `rows_of`, for rows already split into (group, size)."""
        target = x[:, :, :, self.row : self.row + self.blocks * self.size]
        target.unflatten(3, (self.blocks, self.size)).copy_(rows.transpose(2, 3))

    # -- keys

    def _windows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Return (…, blocks, span, dim) windows of (…, kv_len, dim); `fill` where one leaves the sequence."""
        before, after = max(0, -self.start), max(0, self._stop - x.shape[-2])
        keys = x[..., max(0, self.start) : self._stop, :]
        if before or after:
            keys = F.pad(keys, (0, 0, before, after), value=fill)
        if self.blocks == 1:
            return keys.unsqueeze(-3)
        return keys.unfold(-2, self.span, self.size).transpose(-1, -2)

    def _sink_keys(self, x: Tensor) -> Tensor:
        """Return the sink keys of each row: (batch, kv_heads, blocks, 1, size, sinks, dim); without segments,
        those of all rows: (batch, kv_heads, 1, sinks, dim)."""
        sinks, index = self.part.problem.sinks, self._sink_index
        if index is None:
            return x[:, :, None, :sinks]
        gathered = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
        return gathered.unflatten(2, (self.blocks, 1, self.size, sinks))

    @cached_property
    def _sink_index(self) -> Tensor | None:
        """Return (batch, 1, rows·sinks, 1) positions of sink keys, 0 where there is none."""
        positions = self._tile_sink_positions
        return None if positions is None else positions.clamp(min=0).flatten(1)[:, None, :, None]

    @cached_property
    def _tile_sink_positions(self) -> Tensor | None:
        positions = self.part.sink_positions
        return None if positions is None else positions[:, self.row : self.row + self.blocks * self.size]

    def logits(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Compute rows · keys for all columns of the tile."""
        logits = self.split_rows(rows @ self._windows(keys).mT)
        if self.part.problem.sinks == 0:
            return logits
        sink_keys = self._sink_keys(keys)
        if self._sink_index is None:
            to_sinks = self.split_rows(rows @ sink_keys.mT)
        else:
            to_sinks = (self.split_rows(rows).unsqueeze(-2) * sink_keys).sum(-1)
        return torch.cat([to_sinks, logits], -1)

    def times_keys(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Sum weights · keys over columns: split rows."""
        sinks = self.part.problem.sinks
        out = self.split_rows(weights[..., sinks:].flatten(3, 4) @ self._windows(keys))
        if sinks and self._sink_index is None:
            out += self.split_rows(weights[..., :sinks].flatten(3, 4) @ self._sink_keys(keys))
        elif sinks:
            out += (weights[..., :sinks, None] * self._sink_keys(keys)).sum(-2)
        return out

    def add_to_keys(self, keys: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add weightsᵀ · rows to keys, column by column: the transpose of `times_keys`."""
        sinks = self.part.problem.sinks
        to_windows = weights[..., sinks:].flatten(3, 4).mT @ rows
        if self.blocks == 1:
            total = to_windows.squeeze(2)
        else:
            # overlapping windows: add them in pieces of one block, which do not overlap
            pieces = -(-self.span // self.size)
            total = keys.new_zeros(*keys.shape[:2], self.blocks + pieces - 1, self.size, keys.shape[3])
            for piece in range(pieces):
                columns = to_windows[:, :, :, piece * self.size : (piece + 1) * self.size]
                total[:, :, piece : piece + self.blocks, : columns.shape[3]] += columns
            total = total.flatten(2, 3)
        first, stop = max(0, self.start), min(keys.shape[2], self.start + total.shape[2])
        keys[:, :, first:stop] += total[:, :, first - self.start : stop - self.start]
        if sinks == 0:
            return
        index = self._sink_index
        if index is None:
            keys[:, :, :sinks] += (weights[..., :sinks].flatten(3, 4).mT @ rows).sum(2)
        else:
            to_sinks = weights[..., :sinks, None] * self.split_rows(rows).unsqueeze(-2)
            per_row = to_sinks.sum(3).flatten(2, 4)
            keys.scatter_add_(2, index.expand_as(per_row), per_row)

    # -- scores

    def cap(self, logits: Tensor) -> Tensor:
        """Apply the softcap, in place."""
        softcap = self.part.problem.softcap
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    def bias(self, scores: Tensor) -> Tensor:
        """Apply ALiBi, in place."""
        if self.part.problem.alibi_slopes is None:
            return scores
        slopes = self.part.heads_of(self.part.problem.alibi_slopes)[:, None, :, None, None]
        return scores.sub_(slopes * self._distances.abs())

    def hide(self, scores: Tensor) -> Tensor:
        """Set hidden pairs to -inf, in place."""
        scores[..., self._first_hidden :].masked_fill_(self._hidden, -torch.inf)
        return scores

    def lowest_visible(self, logits: Tensor) -> Tensor:
        """Return each row's lowest logit over visible pairs, inf if there is none; a NaN prevails."""
        partly = logits[..., self._first_hidden :].masked_fill(self._hidden, torch.inf)
        parts = (logits[..., : self._first_hidden], partly)
        lowest = [part.amin(-1, keepdim=True) for part in parts if part.shape[-1]]
        return lowest[0] if len(lowest) == 1 else torch.minimum(*lowest)

    def exp(self, scores: Tensor, in_place: bool) -> Tensor:
        """Compute exp(scores), 0 on hidden pairs; the scores are clamped so that no result is denormal."""
        # exp() of -inf, or with a denormal result, takes a processor up to 20 times longer
        scores.clamp_min_(math.log(torch.finfo(scores.dtype).tiny) + 0.1)
        return self.clear_hidden(scores.exp_() if in_place else scores.exp())

    def clear_hidden(self, scores: Tensor) -> Tensor:
        """Set hidden pairs to 0, in place."""
        scores[..., self._first_hidden :].masked_fill_(self._hidden, 0.0)
        return scores

    def where_seen(self, rows: Tensor, otherwise: float) -> Tensor:
        """Replace rows that see nothing by `otherwise`: padding, since every other row sees itself."""
        return rows if self._query_ids is None else rows.masked_fill(self._query_ids < 0, otherwise)

    @property
    def _first_hidden(self) -> int:
        """The first column that may be hidden from a row of the tile."""
        problem = self.part.problem
        if problem.window is not None or self.part.segment_ids is not None:
            return 0
        return self.span - self.size if problem.causal else self.span

    @cached_property
    def _query_ids(self) -> Tensor | None:
        """The segment ids of the rows: (batch, 1, blocks, 1, size, 1)."""
        ids = self.part.segment_ids
        if ids is None:
            return None
        first = ids.shape[1] - self.part.problem.q.shape[2] + self.row
        rows = ids[:, first : first + self.blocks * self.size]
        return rows.reshape(-1, 1, self.blocks, 1, self.size, 1)

    @cached_property
    def _query_positions(self) -> Tensor:
        """The positions of the rows: (blocks, 1, size, 1)."""
        problem = self.part.problem
        first = problem.k.shape[2] - problem.q.shape[2] + self.row
        positions = torch.arange(first, first + self.blocks * self.size, device=problem.q.device)
        return positions.view(self.blocks, 1, self.size, 1)

    @cached_property
    def _window_positions(self) -> Tensor:
        """The positions of the windows' keys: (blocks, 1, 1, span)."""
        device = self.part.problem.q.device
        block_starts = self.start + self.size * torch.arange(self.blocks, device=device)
        return block_starts.view(-1, 1, 1, 1) + torch.arange(self.span, device=device)

    @cached_property
    def _sink_column_positions(self) -> Tensor:
        """Sink positions, negative where there is none: (1 | batch, 1, 1 | blocks, 1, 1 | size, sinks)."""
        positions, sinks = self._tile_sink_positions, self.part.problem.sinks
        if positions is None:
            return torch.arange(sinks, device=self.part.problem.q.device).view(1, 1, 1, 1, 1, sinks)
        return positions.view(-1, 1, self.blocks, 1, self.size, sinks)

    @cached_property
    def _distances(self) -> Tensor:
        """The query position minus the key position of every column, floating point."""
        in_window = self._query_positions - self._window_positions
        if self.part.problem.sinks:
            to_sinks = self._query_positions - self._sink_column_positions
            shape = torch.broadcast_shapes(in_window.shape[:-1], to_sinks.shape[:-1])
            in_window = torch.cat([to_sinks.expand(*shape, -1), in_window.expand(*shape, -1)], -1)
        return in_window.to(accumulation_dtype(self.part.problem.q))

    @cached_property
    def _hidden(self) -> Tensor:
        """The mask of hidden pairs in the columns from `_first_hidden`; broadcasts to scores."""
        problem = self.part.problem
        leaves_the_sequence = self.start < 0 or self._stop > problem.k.shape[2]
        if leaves_the_sequence or problem.sinks or self.part.segment_ids is not None:
            return self._compute_hidden()
        shape = (self.blocks, self.size)
        if shape not in problem.masks:
            problem.masks[shape] = self._compute_hidden()
        return problem.masks[shape]

    def _compute_hidden(self) -> Tensor:
        problem = self.part.problem
        keys = self._window_positions[..., self._first_hidden :]
        visible = (keys >= 0) & (keys < problem.k.shape[2])
        if problem.causal:
            visible = visible & (keys <= self._query_positions)
        if problem.window is not None:
            visible = visible & ((self._query_positions - keys).abs() < problem.window)
        if self._query_ids is not None:
            assert self.part.segment_ids is not None
            key_ids = self._windows(self.part.segment_ids.unsqueeze(-1), fill=-1).mT
            visible = visible & (self._query_ids == key_ids[:, None, :, None]) & (self._query_ids >= 0)
        if problem.window is not None and problem.sinks:
            sinks = self._sink_column_positions
            behind = self._query_positions - sinks
            outside = (behind if problem.causal else behind.abs()) >= problem.window
            sinks_visible = outside & (sinks >= 0)
            if self._query_ids is not None:
                sinks_visible = sinks_visible & (self._query_ids >= 0)
            shape = torch.broadcast_shapes(visible.shape[:-1], sinks_visible.shape[:-1])
            visible = torch.cat([sinks_visible.expand(*shape, -1), visible.expand(*shape, -1)], -1)
        return ~visible

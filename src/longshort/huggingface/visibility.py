"""The visible pairs of queries and keys in an attention call, and the biases of their scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longshort.stability.visibility import sink_keys

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

_HIDING_BIAS = -1e8
"""A bias at or below it hides a pair; transformers adds the smallest number of the dtype."""


@dataclass(frozen=True)
class HeadWindows:
    """Query heads that share a window.

    Attributes:
        heads: indices of the query heads, ascending, with all that share a KV head.
        window: number of keys that a query sees, its own included; None: no bound.
    """

    heads: tuple[int, ...]
    window: int | None


@dataclass(frozen=True, eq=False)
class Visibility:
    """The visible pairs of one attention call.

    A query sees a key if all of these allow it: the window of its head (or the key is a sink token),
    causality, equal segments that are not negative, `mask` and `rule`.

    Attributes:
        q_len, kv_len: numbers of queries and keys.
        device: the device of all tensors here.
        groups: the heads by window.
        causal: whether later keys are hidden.
        past: position of the first query among the keys.
        sink_tokens: number of first keys of each segment that heads with a window see too.
        segment_ids: the segment ids of the keys, the queries have the last; negative is padding.
        masks: True shows a pair; or a bias to its score, which hides it where it is very low.
        rule: shows pairs by the indices of batch, head, query and key, as FlexAttention's `mask_mod`.
        slopes: the slopes of ALiBi; the bias is -slope·|distance|.
    """

    q_len: int
    kv_len: int
    device: torch.device
    groups: tuple[HeadWindows, ...]
    causal: bool = False
    past: int = 0
    sink_tokens: int = 0
    segment_ids: Int[Tensor, "batch kv_len"] | None = None
    masks: tuple[Shaped[Tensor, "batch heads q_len kv_len"], ...] = ()
    rule: Any = None
    slopes: Float[Tensor, " heads"] | None = None

    def key_ranges(self, rows: slice, window: int | None, most: int) -> Iterator[slice]:
        """Yield ranges of at most `most` keys, which together hold every key that one of the queries sees."""
        stop = min(self.kv_len, self.past + rows.stop) if self.causal else self.kv_len
        start = 0 if window is None else max(0, self.past + rows.start - window + 1)
        if start and self._is_sink is not None:
            sinks = self._is_sink[:, :start].any(0)
            for keys in _ranges(0, start, most):
                if bool(sinks[keys].any()):
                    yield keys
        yield from _ranges(start, stop, most)

    def hidden(self, rows: slice, keys: slice, group: HeadWindows, batch: slice) -> Tensor | None:
        """Mark the hidden pairs of a tile: (batch or 1, heads or 1, queries, keys); None if there are
        none."""
        hidden = self._hidden_by_position(rows, keys, group.window, batch)
        if self.segment_ids is not None:
            ids = self.segment_ids if self.segment_ids.shape[0] == 1 else self.segment_ids[batch]
            offset = self.kv_len - self.q_len
            query_ids = ids[:, offset + rows.start : offset + rows.stop, None]
            hidden = _either(hidden, ((query_ids != ids[:, None, keys]) | (query_ids < 0))[:, None])
        for mask in self.masks:
            tile = _tile(mask, rows, keys, group, batch)
            if mask.dtype == torch.bool:
                hidden = _either(hidden, ~tile)
            else:
                hidden = _either(hidden, tile <= max(_HIDING_BIAS, torch.finfo(mask.dtype).min / 2))
        if self.rule is not None:
            hidden = _either(hidden, ~self._shown_by_rule(rows, keys, group, batch))
        return hidden

    def bias(self, rows: slice, keys: slice, group: HeadWindows, batch: slice) -> Tensor | None:
        """Return the biases of the scores of a tile: (batch or 1, heads or 1, queries, keys)."""
        total = None
        for mask in self.masks:
            if mask.dtype != torch.bool:
                tile = _tile(mask, rows, keys, group, batch)
                total = tile if total is None else total + tile
        if self.slopes is not None:
            slopes = self.slopes[list(group.heads), None, None]
            linear = -slopes * self._distances(rows, keys).abs()
            total = linear if total is None else total + linear
        return total

    def _hidden_by_position(
        self, rows: slice, keys: slice, window: int | None, batch: slice
    ) -> Tensor | None:
        first, last = self.past + rows.start, self.past + rows.stop - 1
        too_late = self.causal and keys.stop - 1 > first
        too_far = window is not None and last - keys.start >= window
        if not too_late and not too_far:
            return None
        distances = self._distances(rows, keys)
        hidden = distances < 0 if too_late else None
        if window is not None and too_far:
            far = (distances >= window)[None, None]
            if self._is_sink is not None:
                is_sink = self._is_sink if self._is_sink.shape[0] == 1 else self._is_sink[batch]
                far = far & ~is_sink[:, None, None, keys]
            hidden = _either(hidden, far)
        return hidden

    def _shown_by_rule(self, rows: slice, keys: slice, group: HeadWindows, batch: slice) -> Tensor:
        at = self._positions
        indices = at.new_tensor(group.heads)
        heads, queries, columns = indices[:, None, None], at[rows][:, None], at[keys]
        batches = torch.arange(batch.start, batch.stop, device=self.device)[:, None, None, None]
        shape = (len(batches), len(group.heads), len(queries), len(columns))
        return self.rule(batches, heads, queries, columns).expand(shape)

    def _distances(self, rows: slice, keys: slice) -> Tensor:
        queries = self._positions[self.past + rows.start : self.past + rows.stop]
        return queries[:, None] - self._positions[keys]

    @cached_property
    def _positions(self) -> Tensor:
        return torch.arange(max(self.kv_len, self.past + self.q_len), device=self.device)

    @cached_property
    def _is_sink(self) -> Tensor | None:
        """The mask of sink tokens, (batch or 1, kv_len); None if there are none."""
        return sink_keys(self.segment_ids, self.kv_len, self.sink_tokens, self.device)


def _tile(mask: Tensor, rows: slice, keys: slice, group: HeadWindows, batch: slice) -> Tensor:
    """Cut a tile out of (batch or 1, heads or 1, q_len or 1, at least kv_len)."""
    mask = mask if mask.shape[0] == 1 else mask[batch]
    if 1 < mask.shape[1] != len(group.heads):
        mask = mask[:, list(group.heads)]
    return mask[:, :, rows if mask.shape[2] > 1 else slice(None), keys]


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a | b


def _ranges(start: int, stop: int, most: int) -> Iterator[slice]:
    for first in range(start, stop, most):
        yield slice(first, min(first + most, stop))

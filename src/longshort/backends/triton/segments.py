"""The places of each segment's tokens and sinks, as the kernels read them; computed on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of a call, and its sink tokens.

    All tensors are int32. A sink has a slot, in the order of segments and then of positions, so that the
    sinks of neighbouring segments have neighbouring slots.

    Attributes:
        ids: (batch, T), in the order of the segment ids, -1 for padding; None: one segment.
        first, last: (batch, T), the smallest and the largest position of the token's segment; T and -1 for
            padding; None: one segment.
        sinks_begin, sinks_end: (batch, T), the slots of the sinks of the token's segment; None: one segment.
        sink_positions: (batch, slots), position of the sink of each slot, -1 for none; None: no sinks.
        slots: (batch, T), slot of a token that is a sink, or -1; None: no sinks.
    """

    ids: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    sinks_begin: Tensor | None = None
    sinks_end: Tensor | None = None
    sink_positions: Tensor | None = None
    slots: Tensor | None = None


def find_segments(
    segment_ids: Tensor | None, batch: int, kv_len: int, sink_tokens: int, device: torch.device
) -> Segments:
    """Find the segments and the sinks of a call.

    Args:
        segment_ids: (batch, kv_len) of int64, or None for one segment.
        batch, kv_len: sizes of the keys.
        sink_tokens: number of first tokens of a segment that are sinks.
        device: the device of the call.
    """
    if segment_ids is None:
        if sink_tokens == 0:
            return Segments()
        positions = torch.arange(kv_len, dtype=torch.int32, device=device)
        slots = torch.where(positions < sink_tokens, positions, -1)
        sinks = positions[: min(sink_tokens, kv_len)]
        return Segments(sink_positions=sinks.expand(batch, -1), slots=slots.expand(batch, -1))

    ids, order = segment_ids.contiguous().sort(dim=1, stable=True)  # kernels read one stride alone
    index = torch.arange(kv_len, device=device).expand(batch, -1)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    ends = begins.roll(-1, 1)  # the first entry begins a segment, so the last ends one
    begin = torch.where(begins, index, 0).cummax(1).values
    end = torch.where(ends, index, kv_len).flip(1).cummin(1).values.flip(1)
    is_real = ids >= 0
    ranks = begins.cumsum(1) - 1
    is_sink = is_real & (index - begin < sink_tokens)
    sinks_until = is_sink.cumsum(1)
    sinks_begin = sinks_until.gather(1, begin) - is_sink.gather(1, begin).long()

    def by_position(values: Tensor, of_padding: int) -> Tensor:
        values = torch.where(is_real, values, of_padding)
        return torch.empty_like(values).scatter_(1, order, values).int()

    found = {
        "ids": by_position(ranks, -1),
        "first": by_position(order.gather(1, begin), kv_len),
        "last": by_position(order.gather(1, end), -1),
    }
    if sink_tokens == 0:
        return Segments(**found)
    slots = torch.where(is_sink, sinks_until - 1, -1)
    positions = order.new_full((batch, kv_len + 1), -1)
    positions.scatter_(1, torch.where(is_sink, slots, kv_len), order)  # what is no sink goes to the last one
    positions[:, kv_len] = -1
    return Segments(
        **found,
        sinks_begin=by_position(sinks_begin, kv_len),
        sinks_end=by_position(sinks_until.gather(1, end), 0),
        sink_positions=positions[:, :kv_len].int().contiguous(),
        slots=by_position(slots, -1),
    )

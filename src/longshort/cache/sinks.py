"""`SinkTokens`: where the sink tokens of cached sequences stand, told from segment ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshort.key_values import is_recording

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int

_SEVERAL = (
    "segment_ids must name one segment per sequence, besides padding, with sink_tokens and this cache, which "
    "keeps the sinks of one; there are several in the cache"
)


class SinkTokens:
    """The sink tokens of the sequences in a cache: the first ones of each that are not padding.

    Values of tensors are read when the first tokens come, and later only where a read does not wait: on a
    CPU, outside of compiled graphs. Elsewhere a step computes with tensors alone.

    Args:
        count: sink tokens of a sequence, >= 1.

    Attributes:
        positions: (batch, count) of int64, -1 for tokens that are still to come; None before the first call
            of `note`.
        are_known: whether all positions have been read, and none is to come.
        end: one past the last of them if they are known.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._memory: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        self.positions: Tensor | None = None
        self.are_known = False
        self.end = 0
        self._has_several = False
        self._segment: Tensor | None = None  # of each sequence, negative if there is only padding
        self._are_several: Tensor | None = None  # whether some sequence has more than one segment

    def note(self, segment_ids: Int[Tensor, "batch kv_len"] | None, new: Tensor, past: int) -> None:
        """Take note of new tokens.

        Args:
            segment_ids: the segment ids of all tokens; None: one segment.
            new: keys of the new tokens, (batch, kv_heads, new, head_dim).
            past: number of the earlier tokens.
        """
        is_eager = not is_recording()
        if segment_ids is None:
            if not self.are_known:
                positions = torch.arange(self.count, device=new.device).repeat(len(new), 1)
                self.positions = self._in_place("positions", positions)
                self.are_known, self.end = is_eager and past + new.shape[2] >= self.count, self.count
            return
        is_first = self._segment is None
        self._note_segments(segment_ids if is_first else segment_ids[:, past:])
        if self.are_known:
            return
        rank = (segment_ids >= 0).cumsum(1)
        ordinals = torch.arange(1, self.count + 1, device=rank.device).repeat(len(rank), 1)
        positions = torch.searchsorted(rank, ordinals)
        self.positions = self._in_place("positions", torch.where(positions < rank.shape[1], positions, -1))
        if is_eager and (is_first or rank.device.type == "cpu") and len(rank):
            assert self._are_several is not None
            numbers = torch.stack([self.positions.amin(), self.positions.amax(), self._are_several.long()])
            least, last, several = numbers.tolist()
            self.are_known, self.end, self._has_several = least >= 0, last + 1, bool(several)

    def require_one_segment(self) -> None:
        """Refuse sequences of several segments, whose sinks are not all here.

        Raises:
            ValueError: a sequence has several. In a compiled graph, or on another device than a CPU after the
                first tokens, it is a failed assertion in the device's queue.
        """
        if self._has_several:
            raise ValueError(_SEVERAL)
        if self._are_several is None:
            return
        if is_recording() or self._are_several.device.type != "cpu":
            torch.ops.aten._assert_async.msg(~self._are_several, _SEVERAL)
        elif bool(self._are_several):
            raise ValueError(_SEVERAL)

    def note_on_device(self, segment_ids: Int[Tensor, "batch max_length"] | None, past: Tensor) -> None:
        """Take note of one new token after `past`, (1,) of int64, when all sinks are known; nothing changes
        here, since the step may run again. Another segment is a failed assertion in the device's queue."""
        if segment_ids is None or self._segment is None:
            return
        known = self._segment[:, None]
        new = segment_ids.index_select(1, past.clamp(max=segment_ids.shape[1] - 1))
        is_other = (new >= 0) & (known >= 0) & (new != known)
        torch.ops.aten._assert_async.msg(~is_other.any(), _SEVERAL)

    def crop(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        self.are_known = self.are_known and self.end <= length

    def map_batch(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Replace each tensor x, whose batch is dimension `dim`, by `change(x, dim)`."""
        if self.positions is not None:
            self.positions = self._in_place("positions", change(self.positions, 0))
        if self._segment is not None:
            self._segment = self._in_place("segment", change(self._segment, 0))

    def _in_place(self, name: str, value: Tensor) -> Tensor:
        """Return a value in the memory that it had before, where captured steps read it."""
        if is_recording():
            return value
        memory = self._memory.get(name)
        kind = value.shape, value.dtype, value.device
        if memory is None or (memory.shape, memory.dtype, memory.device) != kind:
            with torch.inference_mode(False):  # it is written to in any mode
                memory = self._memory[name] = torch.empty_like(value)
        return memory.copy_(value)

    def _note_segments(self, new: Tensor) -> None:
        """Note whether new tokens, the first ones of all or some of a step, are all padding or in one
        segment."""
        if self._segment is None or self._are_several is None:
            self._segment = self._in_place("segment", new.amax(1))
            self._are_several = torch.zeros((), dtype=torch.bool, device=new.device)
        elif not self.are_known:  # else each sequence has a segment already
            segment = torch.where(self._segment < 0, new.amax(1).to(self._segment.dtype), self._segment)
            self._segment = self._in_place("segment", segment)
        is_other = (new >= 0) & (new != self._segment[:, None])
        self._are_several = self._in_place("are_several", self._are_several | is_other.any())

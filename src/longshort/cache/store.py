"""Keys and values of the heads that share a window: a ring for local heads, a growing store for global
ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int, Shaped

    from longshort.cache.sinks import SinkTokens

_SLACK = 4
"""A store that must grow allocates a quarter more: on average a key is copied 4 times."""


class Store:
    """The keys and values of one group of heads, by position.

    Positions count from 0, padding included. Position p is in slot p % ring; a ring overwrites its oldest
    keys, except that sinks are copied to a tensor beside it.

    Attributes:
        window: window of the heads; None is global.
        ring: positions that are kept, window + rollback; 0 keeps all.
        length: positions seen so far.
        lost: the number of first positions that are gone, whatever the length.
        expected: positions that have been announced, so that memory for them is allocated at once.
        data: (2, batch, kv_heads, slots, head_dim), keys and values; None before the first append, as all
            tensors.
        sinks: (2, batch, kv_heads, n, head_dim), those of the first `sink_tokens` keys that left the ring.
        sink_positions: (batch, n) of int64, where they stood; -1 for none.
        version: counts the changes of the three tensors, of `ring` and of `lost`.
    """

    def __init__(
        self, window: int | None, sink_tokens: int, rollback: int = 0, max_length: int | None = None
    ) -> None:
        self.window = window
        self.sink_tokens = 0 if window is None else sink_tokens
        self.ring = 0 if window is None else window + rollback
        self.max_length = max_length
        self.version = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        self.length = self.expected = 0
        self.lost = 0
        self.version += 1
        self.data: Tensor | None = None
        self.sinks: Tensor | None = None  # as data
        self.sink_positions: Tensor | None = None

    @property
    def first(self) -> int:
        """The first position that the ring still has."""
        return self.next_first(0)

    def next_first(self, new: int) -> int:
        """`first` after `new` more positions."""
        return max(self.lost, self.length + new - self.ring) if self.ring else 0

    def loses_needed(self, new: int) -> bool:
        """Whether `new` positions overwrite some that the first of them sees."""
        return self.window is not None and self.next_first(new) > max(
            self.first, self.length - self.window + 1
        )

    def kept(self) -> tuple[int, int]:
        """Count the positions in the store, and the sinks beside it."""
        return self.length - self.first, min(self.sink_tokens, self.first)

    def nbytes_used(self) -> int:
        """Bytes of the keys and values that are kept."""
        if self.data is None:
            return 0
        slots = self.data.shape[3]
        return sum(self.kept()) * (self.data.nbytes // slots if slots else 0)

    def nbytes_allocated(self) -> int:
        """Bytes of memory taken for keys and values."""
        return sum(x.nbytes for x in (self.data, self.sinks) if x is not None)

    def reserve(self, new: int, like: Tensor | None = None) -> Tensor:
        """Allocate memory for `new` positions and return `data`. The first time, `like` is a tensor of them,
        (batch, kv_heads, any, head_dim)."""
        slots = 0 if self.data is None else self.data.shape[3]
        needed = self._capped(self.length + new)
        if self.data is not None and slots >= needed:
            return self.data
        like = like if self.data is None else self.data[0]
        assert like is not None
        wanted = self.max_length
        if wanted is None:
            expected = max(self.length + new, self.expected)
            wanted = expected + expected // _SLACK
        self._allocate(like, self._capped(wanted))
        assert self.data is not None
        return self.data

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `data`, `sinks` and `sink_positions`, which exist after the first append."""
        assert self.data is not None and self.sinks is not None and self.sink_positions is not None
        return self.data, self.sinks, self.sink_positions

    def append(self, keys: Tensor, values: Tensor, sink_tokens: SinkTokens | None) -> None:
        """Add (batch, kv_heads, new, head_dim) keys and values, of which sink_tokens have taken note."""
        data = self.reserve(keys.shape[2], keys)
        start, end = self.length, self.length + keys.shape[2]
        self.move_sinks(keys, values, sink_tokens)
        begin = self.next_first(keys.shape[2]) if self.ring else start
        begin = max(begin, start)
        if self.ring and torch.compiler.is_compiling():
            kept = torch.arange(begin - start, end - start, device=data.device)
            for target, new in zip(data, (keys, values), strict=True):
                target.index_copy_(2, self._slots(begin, end), new.index_select(2, kept))
        else:
            for low, high in self._runs(begin, end):
                slot = self._slot(low)
                for target, new in zip(data, (keys, values), strict=True):
                    target[:, :, slot : slot + high - low] = new[:, :, low - start : high - start]
        self.advance(keys.shape[2])

    def advance(self, new: int) -> None:
        """Count `new` positions that have been written."""
        self.length += new

    def view(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions begin ... end - 1, none before `first`: a view where they lie in one
        piece, else a copy."""
        assert self.data is not None
        if self.ring and torch.compiler.is_compiling():
            keys, values = self.data.index_select(3, self._slots(begin, end)).unbind()
            return keys, values
        parts = [
            self.data[:, :, :, self._slot(low) : self._slot(low) + high - low]
            for low, high in self._runs(begin, end)
        ]
        keys, values = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)).unbind()
        return keys, values

    def move_sinks(self, keys: Tensor, values: Tensor, sink_tokens: SinkTokens | None) -> None:
        """Copy the sinks that these new positions will overwrite to `sinks`."""
        if not self.sink_tokens:
            return
        assert sink_tokens is not None and sink_tokens.positions is not None
        begin, end = self.first, self.next_first(keys.shape[2])
        is_eager = not torch.compiler.is_compiling()  # in a graph each case would be another one
        if is_eager and (begin == end or (sink_tokens.are_known and begin >= sink_tokens.end)):
            return
        self._reserve_sinks(end)
        data, sinks, positions = self.tensors()
        spots = sink_tokens.positions[:, : positions.shape[1]]
        slots = (spots.clamp_min(0) % self.ring).clamp_max(data.shape[3] - 1)
        leaving = list(gather_keys(data, slots))
        if keys.shape[2] > 1:  # a single key never leaves as it comes
            places = (spots - self.length).clamp(0, keys.shape[2] - 1)
            is_held = (spots < self.length)[:, None, :, None]
            for i, new in enumerate((keys, values)):
                leaving[i] = torch.where(is_held, leaving[i], gather_keys(new[None], places)[0])
        leaves = (spots >= begin) & (spots < end)
        for i, x in enumerate(leaving):
            sinks[i].copy_(torch.where(leaves[:, None, :, None], x, sinks[i]))
        positions.copy_(torch.where(leaves, spots, positions))

    def adopt(self, length: int, sink_tokens: SinkTokens | None) -> None:
        """Take over positions that were appended, and sinks that were copied, on the device alone."""
        self.length = length
        if self.sink_tokens and self.sink_positions is not None:
            assert sink_tokens is not None and sink_tokens.positions is not None
            spots = sink_tokens.positions[:, : self.sink_positions.shape[1]]
            self.sink_positions = torch.where(spots < self.first, spots, -1)
            self.version += 1

    def crop(self, length: int) -> None:
        """Forget the positions from `length` on, at least `least_length`."""
        self.lost = self.first
        self.length = length
        self.version += 1

    def least_length(self) -> int:
        """The least length to crop to: a shorter sequence would see what the ring has lost."""
        return self.first + self.window if self.first and self.window is not None else 0

    def set_rollback(self, rollback: int) -> None:
        """Keep `rollback` positions beyond the window from now on; never fewer than are kept now."""
        if self.window is None or self.window + rollback <= self.ring:
            return
        self.version += 1
        if self.data is None or self.length <= self.ring:
            self.ring = self.window + rollback  # nothing has been overwritten yet
            return
        self.lost = first = self.first
        kept = torch.stack(self.view(first, self.length))
        self.ring = self.window + rollback
        self._allocate(kept[0], self._capped(self.length))
        for low, high in self._runs(first, self.length):
            slot = self._slot(low)
            self.data[:, :, :, slot : slot + high - low] = kept[:, :, :, low - first : high - first]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor x by `change(x)`, of shape (2, batch, kv_heads, n, head_dim)."""
        self.version += 1
        self.data = None if self.data is None else change(self.data)
        self.sinks = None if self.sinks is None else change(self.sinks)

    def map_batch(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Replace each tensor x, whose batch is dimension `dim`, by `change(x, dim)`."""
        self.map(lambda x: change(x, 1).contiguous())
        if self.sink_positions is not None:
            self.sink_positions = change(self.sink_positions, 0).contiguous()

    def _capped(self, positions: int) -> int:
        return min(positions, self.ring) if self.ring else positions

    def _slot(self, position: int) -> int:
        return position % self.ring if self.ring else position

    def _slots(self, begin: int, end: int) -> Int[Tensor, " positions"]:
        """Slots of positions begin ... end - 1 in a ring, for compilers: with slices, each place where the
        ring wraps would be another graph."""
        assert self.data is not None
        return torch.arange(begin, end, device=self.data.device) % self.ring

    def _runs(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Positions begin ... end - 1, at most a ring of them, in runs that lie side by side."""
        if not self.ring:
            return [(begin, end)]
        turn = (begin // self.ring + 1) * self.ring
        return [(begin, end)] if end <= turn else [(begin, turn), (turn, end)]

    def _allocate(self, like: Tensor, slots: int) -> None:
        """Allocate new memory and copy what is there, which must not have wrapped around."""
        batch, kv_heads, _, head_dim = like.shape
        data = like.new_empty((2, batch, kv_heads, slots, head_dim))
        if self.data is not None:
            held = min(self.data.shape[3], slots)
            data[:, :, :, :held] = self.data[:, :, :, :held]
        else:
            self.sinks = like.new_empty((2, batch, kv_heads, 0, head_dim))
            self.sink_positions = torch.empty(batch, 0, dtype=torch.int64, device=like.device)
        self.data = data
        self.version += 1
        if slots == self.ring:  # from now on keys leave, and shapes stay as they are
            self._reserve_sinks(1 if self.max_length is None else self.sink_tokens)

    def _reserve_sinks(self, count: int) -> None:
        """Allocate memory for the sinks among `count` positions."""
        data, old, old_positions = self.tensors()
        held = old.shape[3]
        if held == self.sink_tokens or held >= count:
            return
        rows = min(self.sink_tokens, max(2 * count, self.ring))
        batch, kv_heads, _, head_dim = data[0].shape
        # zeros: their scores are hidden, but they are read
        self.sinks = data.new_zeros((2, batch, kv_heads, rows, head_dim))
        self.sink_positions = torch.full((batch, rows), -1, dtype=torch.int64, device=data.device)
        self.sinks[:, :, :, :held], self.sink_positions[:, :held] = old, old_positions
        self.version += 1


def gather_keys(
    x: Shaped[Tensor, "parts batch kv_heads keys head_dim"], index: Int[Tensor, "batch n"]
) -> Shaped[Tensor, "parts batch kv_heads n head_dim"]:
    """Return the keys with these indices, others in each sequence."""
    parts, batch, kv_heads, _, head_dim = x.shape
    index = index[None, :, None, :, None].expand(parts, batch, kv_heads, -1, head_dim)
    return x.gather(3, index)

"""The layout of an attention layer's heads, as plain data: how far each head sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from longshort.checks import require_integer


@dataclass(frozen=True)
class HeadGroup:
    """The heads of a layout that share one window.

    Attributes:
        window: number of keys that each query of these heads sees, itself included; None is global.
        heads: indices of the query heads, ascending.
        kv_heads: indices of the key/value heads that serve them, ascending.
    """

    window: int | None
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class HeadLayout:
    """One window per query head, and how many key/value heads serve them.

    Attributes:
        windows: per query head the number of keys that a query sees, itself included (an integer >= 1),
            or None for a global head. Query heads that share a key/value head share a window.
        num_kv_heads: key/value heads, a divisor of the number of query heads; None means one per query head.
        sink_tokens: number of first keys of each segment that stay visible to local heads too.

    Raises:
        ValueError: a field is out of its range; the message names the field.
    """

    windows: tuple[int | None, ...]
    num_kv_heads: int = None  # type: ignore[assignment]  # None is resolved on construction
    sink_tokens: int = 0
    groups: tuple[HeadGroup, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        windows = _checked_windows(self.windows)
        num_heads = len(windows)
        num_kv_heads = num_heads if self.num_kv_heads is None else self.num_kv_heads
        _require_divisor(num_kv_heads, num_heads)
        require_integer("sink_tokens", self.sink_tokens, minimum=0)
        group_size = num_heads // num_kv_heads
        for kv_head in range(num_kv_heads):
            shared = windows[kv_head * group_size : (kv_head + 1) * group_size]
            if len(set(shared)) > 1:
                raise ValueError(
                    f"windows of query heads that share a key/value head must be equal, got {shared} for the "
                    f"{group_size} query heads of key/value head {kv_head}"
                )
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "windows", windows)
        set_field(self, "num_kv_heads", int(num_kv_heads))
        set_field(self, "sink_tokens", int(self.sink_tokens))
        set_field(self, "groups", _group_heads(windows, group_size))

    @classmethod
    def split(
        cls,
        num_heads: int,
        num_global: int,
        window: int,
        num_kv_heads: int | None = None,
        sink_tokens: int = 0,
    ) -> HeadLayout:
        """Build the layout of the paper: local heads first, then global heads.

        Args:
            num_heads: query heads, >= 1.
            num_global: how many of them are global, 0 ... num_heads; a multiple of the number of query heads
                that share a key/value head.
            window: keys that a local head's query sees, itself included, >= 1.
            num_kv_heads: key/value heads; None means one per query head.
            sink_tokens: number of first keys of each segment that stay visible to local heads too.

        Raises:
            ValueError: an argument is out of its range; the message names it.
        """
        require_integer("num_heads", num_heads, minimum=1)
        require_integer("num_global", num_global, minimum=0)
        require_integer("window", window, minimum=1)
        if num_global > num_heads:
            raise ValueError(f"num_global must be at most num_heads ({num_heads}), got {num_global}")
        if num_kv_heads is not None:
            _require_divisor(num_kv_heads, num_heads)
            group_size = num_heads // num_kv_heads
            if num_global % group_size:
                raise ValueError(
                    f"num_global must be a multiple of the {group_size} query heads that share a key/value "
                    f"head, got {num_global}"
                )
        windows = (window,) * (num_heads - num_global) + (None,) * num_global
        return cls(windows, num_kv_heads, sink_tokens)  # type: ignore[arg-type]

    def equals(self, other: Any) -> bool:
        """Compare as `==` does, but at once if both are one object, and in steps that `torch.compile` can
        trace: it treats a frozen dataclass as a constant, although its numbers may be symbolic."""
        return self is other or (
            isinstance(other, HeadLayout)
            and self.windows == other.windows
            and self.num_kv_heads == other.num_kv_heads
            and self.sink_tokens == other.sink_tokens
        )

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return len(self.windows)

    @property
    def group_size(self) -> int:
        """Number of query heads that share one key/value head."""
        return len(self.windows) // self.num_kv_heads

    @property
    def local_heads(self) -> tuple[int, ...]:
        """Indices of the query heads that have a window."""
        return tuple(head for head, window in enumerate(self.windows) if window is not None)

    @property
    def global_heads(self) -> tuple[int, ...]:
        """Indices of the query heads that see every earlier key."""
        return tuple(head for head, window in enumerate(self.windows) if window is None)

    def score_count(self, q_len: int, kv_len: int) -> int:
        """Count the visible causal (query, key) pairs of all query heads, exactly.

        The queries are the last `q_len` of `kv_len` positions of one segment.

        Raises:
            ValueError: a length is negative or not an integer, or q_len > kv_len.
        """
        require_integer("q_len", q_len, minimum=0)
        require_integer("kv_len", kv_len, minimum=0)
        if q_len > kv_len:
            raise ValueError(f"q_len must be at most kv_len ({kv_len}), got {q_len}")
        return sum(
            _sum_of_capped(kv_len, self._reach(window)) - _sum_of_capped(kv_len - q_len, self._reach(window))
            for window in self.windows
        )

    def kv_bytes(self, length: int, head_dim: int, dtype: torch.dtype) -> int:
        """Count the bytes of keys and values that must be kept to decode after `length` tokens of a sequence.

        A local head needs its last `window` keys and its sink tokens, a global head all `length`.

        Raises:
            ValueError: length < 0, head_dim < 1, or one of them is not an integer.
            TypeError: dtype is not a torch.dtype.
        """
        require_integer("length", length, minimum=0)
        require_integer("head_dim", head_dim, minimum=1)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
        kept = 0
        for window in self.windows[:: self.group_size]:
            reach = self._reach(window)
            kept += length if reach is None else min(length, reach)
        return 2 * kept * head_dim * dtype.itemsize

    def _reach(self, window: int | None) -> int | None:
        """The most keys that one query of a head with this window sees: the window and the sink tokens."""
        return None if window is None else window + self.sink_tokens

    def __repr__(self) -> str:
        runs = [(window, len(list(run))) for window, run in groupby(self.windows)]
        windows = " + ".join(f"({window},)" + (f" * {count}" if count > 1 else "") for window, count in runs)
        parts = [f"windows={windows}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        if self.sink_tokens:
            parts.append(f"sink_tokens={self.sink_tokens}")
        return f"HeadLayout({', '.join(parts)})"


def _require_divisor(num_kv_heads: Any, num_heads: int) -> None:
    require_integer("num_kv_heads", num_kv_heads, minimum=1)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads must divide the number of query heads ({num_heads}), got {num_kv_heads}"
        )


def _checked_windows(windows: Any) -> tuple[int | None, ...]:
    if isinstance(windows, str) or not isinstance(windows, Iterable):
        raise ValueError(f"windows must be a sequence with one window per query head, got {windows!r}")
    checked = tuple(windows)
    if not checked:
        raise ValueError("windows must name at least one head, got none")
    for head, window in enumerate(checked):
        if window is not None:
            require_integer(f"windows[{head}]", window, minimum=1)
    return tuple(None if window is None else int(window) for window in checked)


def _group_heads(windows: tuple[int | None, ...], group_size: int) -> tuple[HeadGroup, ...]:
    groups = []
    for window in dict.fromkeys(windows):
        heads = tuple(head for head, other in enumerate(windows) if other == window)
        groups.append(HeadGroup(window, heads, tuple(head // group_size for head in heads[::group_size])))
    return tuple(groups)


def _sum_of_capped(count: int, cap: int | None) -> int:
    """Sum 1 + 2 + ... + count, with each term capped at cap."""
    ramp = count if cap is None else min(count, cap)
    return ramp * (ramp + 1) // 2 + (count - ramp) * ramp

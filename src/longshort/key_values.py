"""The protocol between an attention layer and a cache, and an adapter for caches that return every key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from longshort.attention import attention

if TYPE_CHECKING:
    from longshort.layout import HeadLayout


def is_recording() -> bool:
    """Return whether this code is compiled, or captured in a CUDA graph: then it may not read values of
    tensors, and runs again without the host."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def positions_after(past: int | Tensor, new: int, device: torch.device) -> Tensor:
    """Return the positions of `new` tokens, (1, new) of int64, after `past`, an int or (1,) of int64."""
    if isinstance(past, Tensor):
        return past + torch.arange(new, device=device)[None]
    return torch.arange(past, past + new, device=device)[None]


class KeyValueCache:
    """Base class of the caches that a layer attends through, such as `longshort.cache.LayerCache`.

    Attributes:
        layout: layout of the layer that it serves.
        length: number of tokens that it holds, or None where that is unknown.
        has_every_key: whether `update` can return the keys of all tokens.
    """

    layout: HeadLayout
    length: int | None
    has_every_key: bool

    def begins_at(self, new: int) -> int | Tensor | None:
        """Return the number of tokens before the next `new` ones: `length`; or where it is only known to the
        device, in a step that is compiled or captured, (1,) of int64. Such a step takes segment ids for as
        many tokens as the cache has memory for."""
        return self.length

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Append keys and values of new tokens; attend from these to all tokens.

        Args:
            q: (batch, heads, new, head_dim).
            k, v: (batch, kv_heads, new, head_dim).
            **options: keyword arguments of `longshort.attention`.
        """
        raise NotImplementedError

    def update(self, k: Tensor, v: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, (batch, kv_heads, new, head_dim); return those of all tokens.

        Raises:
            ValueError: `has_every_key` is False.
        """
        raise NotImplementedError


class UpdatableCache(Protocol):
    """A cache that gives back every key. One that also has a `length` spares the caller `position_ids`; one
    that has a `layout` serves layers of an equal layout only."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) keys and values; return all of them, old and new."""
        ...


class UpdatedCache(KeyValueCache):
    """An object with another interface as a `KeyValueCache`.

    Args:
        cache: an `UpdatableCache`; or an object that has `attend` and `append`, as `LayerCache` has them.
        layout: the layout of the layer, used if the cache has none.

    Raises:
        TypeError: the cache has neither `update` nor `attend`.
    """

    def __init__(self, cache: Any, layout: HeadLayout) -> None:
        self._attends = callable(getattr(cache, "attend", None))
        if not self._attends and not callable(getattr(cache, "update", None)):
            raise TypeError(f"cache must have an update(keys, values), got {type(cache).__name__}")
        self._cache = cache
        self.layout = getattr(cache, "layout", layout)
        self.length = getattr(cache, "length", None)
        self.has_every_key = not self._attends or not self.length

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if self._attends:
            return self._cache.attend(q, k, v, **options)
        keys, values = self._cache.update(k, v)
        return attention(q, keys, values, self.layout, **options)

    def update(self, k: Tensor, v: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._attends:
            return self._cache.update(k, v)
        self._cache.append(k, v, segment_ids)  # to an empty cache: the new keys are all there are
        return k, v

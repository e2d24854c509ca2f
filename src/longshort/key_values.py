"""The protocol between an attention layer and a cache, and an adapter for caches that return every key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from longshort.attention import attention

if TYPE_CHECKING:
    from torch import Tensor

    from longshort.layout import HeadLayout


class KeyValueCache:
    """Base class of the caches that a layer attends through, such as `longshort.cache.LayerCache`.

    Attributes:
        layout: of the layer that it serves.
        length: tokens that it holds, or None where that is unknown.
        has_every_key: whether `update` can return the keys of all tokens.
    """

    layout: HeadLayout
    length: int | None
    has_every_key: bool

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
    """An `UpdatableCache` as a `KeyValueCache`.

    Args:
        cache: to adapt.
        layout: of the layer, where the cache has none.

    Raises:
        TypeError: the cache has no `update`.
    """

    has_every_key = True

    def __init__(self, cache: UpdatableCache, layout: HeadLayout) -> None:
        if not callable(getattr(cache, "update", None)):
            raise TypeError(f"cache must have an update(keys, values), got {type(cache).__name__}")
        self._cache = cache
        self.layout = getattr(cache, "layout", layout)
        self.length = getattr(cache, "length", None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return attention(q, *self.update(k, v), self.layout, **options)

    def update(self, k: Tensor, v: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._cache.update(k, v)

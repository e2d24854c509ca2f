"""Hugging Face caches that split by head: `SplitCache`, and an adapter for a layer of any other."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from longshort.cache import LayerCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Int
    from torch import Tensor

    from longshort.layout import HeadLayout


class SplitCache(Cache):
    """A cache that keeps for each head what it can still see: `window` keys of a local one, all of a global
    one.

    It is what `generate()` uses of longshort's models, and of others after `longshort.huggingface.apply`.
    Only longshort's attention reads it.

    Args:
        layouts: the layouts of the heads of each layer; None: `others` has the layer.
        rollback: tokens that `crop` can take back; assisted decoding asks for its drafts by itself.
        max_length: number of tokens that memory is allocated for at once; shapes then stay as they are, for
            `torch.compile`. None grows.
        others: a cache whose layers serve where layouts has None, such as those of state-space layers.

    Raises:
        TypeError: an entry of layouts is no HeadLayout.
        ValueError: rollback or max_length is out of its range.
    """

    def __init__(
        self,
        layouts: Sequence[HeadLayout | None],
        rollback: int = 0,
        max_length: int | None = None,
        others: Cache | None = None,
    ) -> None:
        layers = [
            SplitCacheLayer(layout, rollback, max_length)
            if layout is not None or others is None
            else others.layers[index]
            for index, layout in enumerate(layouts)
        ]
        super().__init__(layers=layers)
        self._served: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model that it was compared with, which a copy must not keep alive."""
        return {**self.__dict__, "_served": None}

    @property
    def nbytes_used(self) -> int:
        """Bytes of the keys and values that are kept: `longshort.model.kv_bytes` for each sequence, but for
        what rollback adds."""
        return sum(layer.cache.nbytes_used for layer in self._split_layers())

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of memory taken for keys and values."""
        return sum(layer.cache.nbytes_allocated for layer in self._split_layers())

    def expect(self, length: int) -> None:
        """Announce that the cache will soon hold `length` tokens, and allocate memory for them at once.

        Raises:
            ValueError: length is more than max_length.
        """
        for layer in self._split_layers():
            layer.cache.expect(length)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SplitCache:
        """Move, or convert, what is kept; returns the cache itself."""
        for layer in self._split_layers():
            layer.cache.to(device, dtype)
        return self

    def require_layouts(self, layouts: Callable[[], list[HeadLayout]], owner: Any) -> None:
        """Raise a ValueError unless the layers have the layouts of the owner's.

        An owner is asked once in a row, since looking through a model takes a part of a small one's step.
        """
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and self._served is not None and self._served() is owner:
            return
        pairs = zip(self._split_layers(), layouts(), strict=True)
        for index, (layer, wanted) in enumerate(pairs):
            _require_equal(layer.cache.layout, wanted, f" in layer {index}")
        if not is_compiling:
            self._served = weakref.ref(owner)

    def _split_layers(self) -> list[SplitCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, SplitCacheLayer)]


def _require_equal(held: HeadLayout, wanted: HeadLayout, place: str = "") -> None:
    """Raise a ValueError unless a cache has the layout of the model that it is given to."""
    if held.equals(wanted):
        return
    text = "past_key_values must have the layouts of this model"
    if not torch.compiler.is_compiling():  # with Python 3.13 the compiler cannot format layouts
        text += f", {wanted!r}{place}, got {held!r}"
    raise ValueError(text)


class SplitCacheLayer(CacheLayerMixin):
    """One layer of a `SplitCache`.

    Attributes:
        cache: the keys and values.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, layout: HeadLayout | None, rollback: int, max_length: int | None) -> None:
        super().__init__()
        self.cache = LayerCache(layout, rollback, max_length)  # pyright: ignore[reportArgumentType]
        self.is_compileable = max_length is not None

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size or -1

    @property
    def record_past(self) -> bool:
        """Whether all that comes between two crops can be cropped, as assisted decoding needs it."""
        return self.cache.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.cache.record_past = value

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory is taken with the first tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PendingKeys, PendingValues]:
        """Return keys and values that longshort's attention appends and attends to in one step."""
        values = PendingValues(value_states)
        return PendingKeys(self.cache, key_states, values), values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.cache.begins_at(query_length)
        if isinstance(past, int):
            return past + query_length, 0
        assert self.cache.max_length is not None
        return self.cache.max_length, 0

    def get_seq_length(self) -> int | Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.cache.begins_at(1)

    def get_max_length(self) -> int:
        return self.cache.max_length or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: the number is positive, or a ring has lost keys that the next token would see.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        self.cache.crop(max(0, self.cache.length + tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Int[Tensor, " new_batch"]) -> None:
        self.cache.reorder(indices)

    def reorder_cache(self, beam_idx: Int[Tensor, " batch"]) -> None:
        self.cache.reorder(beam_idx)

    def reset(self) -> None:
        self.cache.reset()

    def offload(self) -> None:
        self.cache.to("cpu")

    def prefetch(self) -> None:
        """Nothing: a cache that offloads its layers is not made of these."""


class _Pending:
    """A tensor on its way from a `SplitCache` to longshort's attention; nothing else can read it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise cls._refusal()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of protocols that Python looks for
            raise AttributeError(name)
        raise self._refusal()

    @staticmethod
    def _refusal() -> TypeError:
        return TypeError(
            "past_key_values is a SplitCache, which no other attention than longshort's can read: heads keep "
            "unequal numbers of keys"
        )


class PendingValues(_Pending):
    """Values of new tokens."""


class PendingKeys(_Pending):
    """Keys of new tokens, and the cache that is to keep them.

    Attributes:
        cache: the cache of the layer.
    """

    def __init__(self, cache: LayerCache, keys: Tensor, values: PendingValues) -> None:
        super().__init__(keys)
        self.cache = cache
        cache.counts_on_device = False  # transformers' masks need the length
        self._values = values
        self._is_taken = False

    def take(self, values: PendingValues) -> tuple[Tensor, Tensor]:
        """Return keys and values, (batch, kv_heads, new, head_dim), once.

        Raises:
            ValueError: they were taken before, or the values belong to other keys.
        """
        if self._is_taken or values is not self._values:
            raise ValueError(
                "past_key_values is a SplitCache, which serves one attention for each update of a layer; "
                "this model attends twice to the same keys, or to those of another layer"
            )
        self._is_taken = True
        return self._tensor, values._tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, options: dict[str, Any]) -> Tensor:
        """Append k and v, and attend from q to all tokens; arguments as of `LayerCache.attend`.

        Raises:
            ValueError: the cache has another layout.
        """
        _require_equal(self.cache.layout, layout)
        return self.cache.attend(q, k, v, **options)


class GrowingLayer:
    """Keys and values of one layer in a cache that grows with every token, such as `DynamicCache`.

    Attributes:
        length: tokens that the layer holds.
    """

    def __init__(self, cache: Cache, layer: int) -> None:
        self._cache = cache
        self._layer = layer
        self.length = int(cache.get_seq_length(layer))

    def begins_at(self, new: int) -> int:
        """Return the number of tokens before the next `new` ones."""
        return self.length

    def count_on_host(self) -> None:
        """Nothing: `length` is the host's."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) keys and values; return all of them, old and new.

        Raises:
            ValueError: the tokens are not like those in the cache; or it gave back another number of them, as
                sliding caches do.
        """
        self._require_alike(keys)
        self.length += keys.shape[2]
        keys, values = self._cache.update(keys, values, self._layer)
        if keys.shape[2] != self.length:
            raise ValueError(
                f"past_key_values must be a SplitCache or keep every token, as DynamicCache does: layer "
                f"{self._layer} of {type(self._cache).__name__} gave back {keys.shape[2]} keys "
                f"of {self.length}"
            )
        return keys, values

    def _require_alike(self, keys: Tensor) -> None:
        if self._layer >= len(self._cache.layers):
            return
        held = getattr(self._cache.layers[self._layer], "keys", None)
        if held is None or held.ndim != 4:  # nothing yet, or in another form
            return
        of_held, of_new = ((x.shape[0], x.shape[1], x.shape[3], x.dtype) for x in (held, keys))
        if of_held != of_new:
            raise ValueError(
                "past_key_values must be of this model's (batch, kv_heads, head_dim, dtype) = "
                f"{of_new}, got {of_held} in layer {self._layer}"
            )


def layer_caches(cache: Cache, count: int) -> list[LayerCache] | list[GrowingLayer]:
    """The layers of a cache for a model of `count` layers, as `LongShortAttention` takes them.

    Raises:
        ValueError: the cache has another number of layers, or layers that hold unequal numbers of tokens, as
            after a forward pass that was interrupted.
    """
    if isinstance(cache, SplitCache):
        caches = [layer.cache for layer in cache._split_layers()]
    else:  # it may get layers as they are filled
        caches = [GrowingLayer(cache, layer) for layer in range(max(len(cache), count))]
    if len(caches) != count:
        raise ValueError(
            f"past_key_values must be a cache of {count} layers, as this model has, got one of {len(caches)}"
        )
    lengths = [layer.begins_at(1) for layer in caches]
    are_counted_on_device = [isinstance(length, torch.Tensor) for length in lengths]
    if all(are_counted_on_device):
        return caches
    if any(are_counted_on_device):  # some layers have sinks of which some are still to come
        for layer in caches:
            layer.count_on_host()
        lengths = [layer.begins_at(1) for layer in caches]
    for length in lengths:
        if length != lengths[0]:
            raise ValueError(f"past_key_values must hold equally many tokens in each layer, got {lengths}")
    return caches

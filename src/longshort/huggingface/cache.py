"""One layer of a Hugging Face cache, as `LongShortAttention` expects one."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache


class LayerCache:
    """Keys and values of one layer in a cache that grows with every token, such as `DynamicCache`.

    Attributes:
        length: tokens that the layer holds.
    """

    def __init__(self, cache: Cache, layer: int) -> None:
        self._cache = cache
        self._layer = layer
        self.length = int(cache.get_seq_length(layer))

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) keys and values; return all of them, old and new.

        Raises:
            ValueError: the cache gave back another number of tokens, as sliding caches do.
        """
        self.length += keys.shape[2]
        keys, values = self._cache.update(keys, values, self._layer)
        if keys.shape[2] != self.length:
            raise ValueError(
                f"past_key_values must be a cache that keeps every token, such as DynamicCache: layer "
                f"{self._layer} of {type(self._cache).__name__} gave back {keys.shape[2]} keys "
                f"of {self.length}"
            )
        return keys, values

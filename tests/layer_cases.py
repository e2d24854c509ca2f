"""A small attention layer, its input, and caches, for tests."""

from typing import Any

import torch
from torch import Tensor

from longshort.layers import LongShortAttention
from longshort.layout import HeadLayout

LAYOUT = HeadLayout(windows=(3, 3, 5, 5, None, None), num_kv_heads=3)


class GrowingCache:
    """Keeps everything and says how much that is."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.length += keys.shape[2]
        self._keys.append(keys)
        self._values.append(values)
        return torch.cat(self._keys, 2), torch.cat(self._values, 2)


class SilentCache:
    """Keeps everything and does not say how much that is."""

    def __init__(self) -> None:
        self._cache = GrowingCache()

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values)


def make_layer(layout: HeadLayout = LAYOUT, seed: int = 0, **options: Any) -> LongShortAttention:
    torch.manual_seed(seed)
    layer = LongShortAttention(20, layout, **{"head_dim": 8, **options})
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            if norm is not None:
                norm.weight.uniform_(0.5, 1.5)
        if layer.sink_logits is not None:
            layer.sink_logits.normal_()
        if layer.short_convolution is not None:
            layer.short_convolution.weight.normal_()
    return layer


def make_input(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 20, generator=torch.Generator().manual_seed(seed))

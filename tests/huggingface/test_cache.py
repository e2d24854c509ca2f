"""One layer of a Hugging Face cache."""

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticCache

from longshort.huggingface import GrowingLayer
from longshort.model import preset


def test_a_growing_cache_keeps_layers_apart() -> None:
    cache = DynamicCache()
    first, second = torch.randn(2, 1, 3, 4, 5).unbind(0)
    for layer in (0, 1):
        keys, values = GrowingLayer(cache, layer).update(first + layer, second + layer)
        assert torch.equal(keys, first + layer) and torch.equal(values, second + layer)
    layer_cache = GrowingLayer(cache, 1)
    assert layer_cache.length == 4
    keys, values = layer_cache.update(first[:, :, :1], second[:, :, :1])
    assert layer_cache.length == 5
    assert torch.equal(keys, torch.cat([first + 1, first[:, :, :1]], 2))
    assert torch.equal(values, torch.cat([second + 1, second[:, :, :1]], 2))
    assert GrowingLayer(cache, 0).length == 4


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(Cache(layers=[DynamicSlidingWindowLayer(sliding_window=3)]), id="sliding"),
        pytest.param(StaticCache(preset("tiny"), max_cache_len=20), id="static"),
    ],
)
def test_caches_of_another_length_are_refused(cache: Cache) -> None:
    keys = torch.randn(1, 4, 6, 16)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="past_key_values must be a SplitCache or keep every token"):
        GrowingLayer(cache, 0).update(keys, keys)

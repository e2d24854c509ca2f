"""Heads that may become local, layouts of them, and the size of the cache."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conversion.models import random_llama, random_windows
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from longshort.conversion.heads import KVHead, find_heads
from longshort.huggingface import apply, split_cache


def gemma(**changes: object) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 12,
    }  # fmt: skip
    return Gemma2ForCausalLM(Gemma2Config(**{**settings, **changes})).eval()


@pytest.fixture(scope="module")
def llama_heads():
    return find_heads(random_llama())


@given(chosen=st.sets(st.integers(0, 5)), window=st.integers(1, 50), sinks=st.integers(0, 5))
def test_layouts_keep_the_heads_they_are_made_of(llama_heads, chosen, window, sinks):
    kept = frozenset(llama_heads.candidates[index] for index in chosen)
    layouts = llama_heads.layouts(kept, window, sinks)
    assert llama_heads.kept_in(layouts) == kept
    assert [layout.num_kv_heads for layout in layouts] == [2, 2, 2]
    assert sum(layout.windows.count(None) for layout in layouts) == 2 * len(kept)


def test_layers_with_a_sliding_window_of_their_own_are_no_candidates():
    heads = find_heads(gemma())
    assert heads.candidates == (KVHead(1, 0), KVHead(1, 1), KVHead(3, 0), KVHead(3, 1))
    layouts = heads.layouts((), 4, 2)
    assert [layout.windows[0] for layout in layouts if layout is not None] == [None, 4, None, 4]


@pytest.mark.parametrize("make", [random_llama, gemma])
@pytest.mark.parametrize("length", [3, 40])
def test_the_cache_is_as_large_as_counted(make, length):
    model = make()
    heads = find_heads(model)
    layouts = apply(model, heads.layouts(heads.candidates[1:2], 5, 2))
    cache = split_cache(model)
    with torch.no_grad():
        model(random_windows(1, length), past_key_values=cache)
    held = sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )
    assert heads.cache_bytes(layouts, length, 4) == cache.nbytes_used + held


@pytest.mark.parametrize("make", [random_llama, gemma])
@pytest.mark.parametrize("length", [3, 11, 12, 13, 40])
def test_the_cache_of_the_original_is_as_large_as_counted(make, length):
    model = make()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_windows(1, length), past_key_values=cache)
    layers: list[Any] = cache.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert find_heads(model).original_cache_bytes(length, 4) == held


def test_a_model_without_full_attention_has_nothing_to_make_local():
    model = gemma(layer_types=["sliding_attention"] * 4)
    with pytest.raises(ValueError, match="without a sliding window of their own"):
        find_heads(model)

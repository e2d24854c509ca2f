"""`generate()` with split caches, for any decoder that has layouts."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode

from longshort.huggingface.cache import SplitCache
from longshort.huggingface.cache_name import CACHE_NAME
from longshort.huggingface.state import NAMES, layouts_of, stored_state, text_config

if TYPE_CHECKING:
    from torch import nn


_OTHER_STATIC = set(ALL_STATIC_CACHE_IMPLEMENTATIONS) - {"static"}


def split_cache(model: nn.Module, rollback: int = 0, max_length: int | None = None) -> SplitCache:
    """Return an empty cache for a model to which layouts were applied; pass it as `past_key_values`,
    or as `cache` from transformers 5.24 on.

    `generate()` makes one by itself.

    Args:
        model: see `longshort.huggingface.apply`.
        rollback: number of tokens that `crop` may take back; assisted decoding asks for its own.
        max_length: number of tokens that memory is allocated for at once; None grows.

    Raises:
        ValueError: the model has no layouts, or attends in a way that the cache cannot serve; or an argument
            is out of its range.
    """
    config = text_config(model)
    state, layouts = stored_state(config), layouts_of(model)
    if state is None or layouts is None:
        raise ValueError(f"model must have layouts, got {type(model).__name__} without; call apply first")
    if state.get("cache") is not None:
        raise ValueError(f"model must be one that a SplitCache can serve: {state['cache']}")
    others = DynamicCache(config=config)
    # A layer that also has a state of its own, such as a convolution's, keeps all of its keys.
    plain = [type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in others.layers]
    split = [layout if is_plain else None for layout, is_plain in zip(layouts, plain, strict=True)]
    return SplitCache(split, rollback, max_length, others=others)


def use_split_caches() -> None:
    """Let `generate()` give models that attend by layouts a `SplitCache`, unless the caller passes a cache or
    asks for another kind by `cache_implementation`; "static" makes one of fixed length."""
    mixin: Any = GenerationMixin
    prepare = mixin._prepare_cache_for_generation

    @wraps(prepare)
    def prepare_split(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get(CACHE_NAME)
        if generation_mode == GenerationMode.ASSISTED_GENERATION and isinstance(given, SplitCache):
            given.reset()  # transformers passes all tokens in its first step, cached ones too
        kind = generation_config.cache_implementation
        if kind in _OTHER_STATIC and _can_split(self):
            raise ValueError(
                "cache_implementation must be None, 'static' or 'dynamic' for a model with layouts, got "
                f"{kind!r}"
            )
        is_free = generation_config.use_cache is not False and given is None
        if not is_free or kind not in (None, "static") or not _can_split(self):
            return prepare(
                self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        longest = None if kind is None else max(max_cache_length, generation_config.max_cache_len or 0)
        cache = model_kwargs[CACHE_NAME] = split_cache(self, max_length=longest)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None

    mixin._prepare_cache_for_generation = prepare_split


def _can_split(model: Any) -> bool:
    config = text_config(model)
    state = stored_state(config)
    return (
        isinstance(state, dict)
        and state.get("cache") is None
        and config._attn_implementation in NAMES
        and model._supports_default_dynamic_cache()
    )

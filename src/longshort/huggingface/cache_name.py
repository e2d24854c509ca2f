"""The keyword by which transformers passes a cache to models, and names it in their outputs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

_NAMES = ("cache", "past_key_values")  # from 5.24 on, and before

CACHE_NAME = next(name for name in _NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the cache that a caller passed by one of its names, if any.

    Raises:
        ValueError: it was passed by both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
    return past_key_values if cache is None else cache

"""The costs of different layouts of one model at inference, counted without allocating memory."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longshort.checks import require_integer
from longshort.model.config import LongShortConfig
from longshort.model.costs import Flops, decode_flops, kv_bytes, parameter_count, prefill_flops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST = 2**48  # tokens; no memory holds more, whatever the layout


@dataclass(frozen=True)
class LayoutPlan:
    """The costs of one layout, over all layers and sequences of the batch.

    Attributes:
        name: readable name of the layout.
        config: config of the model with this layout.
        cache_bytes: keys and values that are kept after a prompt.
        prefill: operations on the prompt, with logits for its last token.
        decode: operations on the token after it.
        decode_bytes: memory that must be read for that token: weights and cache.
        longest: the most tokens per sequence whose cache fits beside the weights; 0 if the weights alone do
            not fit; None if no memory was given, or any number fits.
    """

    name: str
    config: LongShortConfig
    cache_bytes: int
    prefill: Flops
    decode: Flops
    decode_bytes: int
    longest: int | None


def hybrid_layers(count: int, layers: int) -> set[int]:
    """Return the indices of the global layers of a hybrid: `count` of `layers`, evenly spaced, each the last
    of its period as in Gemma 3."""
    return {layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers}


def plan_layouts(
    config: LongShortConfig,
    length: int,
    *,
    global_heads: Sequence[int],
    windows: Sequence[int],
    hybrid_window: int = 1024,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    memory: int | None = None,
) -> list[LayoutPlan]:
    """Plan one layout with all heads global (MHSA), one for each number of global heads and each window, and
    for each number a hybrid by layers: some layers global, the others local, as in Gemma 3. A hybrid whose
    layers would all be global is left out.

    The global layers of a hybrid are the number of layers, at least one, whose heads come nearest to the
    global heads of the split by heads. If the two numbers and the windows are equal, so are the costs.

    Args:
        config: shape of the model and sink tokens; its layout is ignored.
        length: tokens of the prompt per sequence, one segment; >= 1.
        global_heads: numbers of global heads per layer, 0 ... heads; multiples of the number of query heads
            that share a key/value head.
        windows: windows of the local heads, >= 1.
        hybrid_window: window of the local layers of hybrids, >= 1; the default is Gemma 3's.
        batch: number of sequences.
        dtype: dtype of weights and cache: float32, bfloat16 or float16.
        memory: bytes for weights and cache; activations need memory beside them.

    Raises:
        ValueError: an argument is out of its range, or the config has a short_convolution; the message names
            it.
    """
    for name, value in (("length", length), ("hybrid_window", hybrid_window), ("batch", batch)):
        require_integer(name, value, minimum=1)
    if memory is not None:
        require_integer("memory", memory, minimum=1)
    for name, values, minimum in (("global_heads", global_heads, 0), ("windows", windows, 1)):
        if not values:
            raise ValueError(f"{name} must name at least one number, got none")
        for value in values:
            require_integer(name, value, minimum)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    group_size = heads // config.num_key_value_heads
    for count in global_heads:
        if count > heads or count % group_size:
            raise ValueError(
                f"global_heads must be multiples of the {group_size} query heads that share a key/value "
                f"head, and at most all {heads} heads, got {count}"
            )
    if config.short_convolution is not None:
        raise ValueError(
            f"config must have no short_convolution, which has no cache, got {config.short_convolution}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    candidates = {"all global (MHSA)": _with_heads(config, heads, windows[0])}
    fewer = [count for count in global_heads if count < heads]
    for count in fewer:
        for window in windows:
            candidates[f"{count} global, window {window}"] = _with_heads(config, count, window)
    for count in filter(None, fewer):
        whole = max(1, round(count * layers / heads))
        if whole >= layers:
            continue  # that is MHSA
        places = hybrid_layers(whole, layers)
        by_layer = [heads if layer in places else 0 for layer in range(layers)]
        name = f"by layers: {whole} of {layers}, window {hybrid_window}"
        candidates[name] = _with_heads(config, by_layer, hybrid_window)
    parameters = parameter_count(config)
    # A token reads one row of each table, and all of a table that also serves as the matrix for the logits.
    read = parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    if any("learned" in kinds for kinds in config.head_position_embeddings()):
        read -= config.max_position_embeddings * config.hidden_size
    free = None if memory is None else memory - parameters * dtype.itemsize

    def plan(name: str, candidate: LongShortConfig) -> LayoutPlan:
        cache = batch * kv_bytes(candidate, length, dtype)
        decode = decode_flops(candidate, length)
        return LayoutPlan(
            name=name,
            config=candidate,
            cache_bytes=cache,
            prefill=prefill_flops(candidate, length).times(batch),
            decode=decode.times(batch),
            decode_bytes=read * dtype.itemsize + cache,
            longest=None if free is None else _longest(candidate, free // batch, dtype),
        )

    return [plan(*candidate) for candidate in candidates.items()]


def _with_heads(config: LongShortConfig, global_heads: int | list[int], window: int) -> LongShortConfig:
    changed = copy.copy(config)
    changed.layouts = None
    changed.num_global_heads, changed.local_window = global_heads, window
    changed.check()
    return changed


def _longest(config: LongShortConfig, free: int, dtype: torch.dtype) -> int | None:
    """Return the most tokens whose keys and values fit into `free` bytes; None if any number does."""
    if free < 0:
        return 0
    fit = bisect_right(range(_LONGEST), free, key=lambda length: kv_bytes(config, length, dtype)) - 1
    return None if fit == _LONGEST - 1 else fit

"""`apply()`: give the layers of any decoder of transformers layouts, after a trial that they work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from longshort.checks import require_integer
from longshort.huggingface.cache import SplitCache
from longshort.huggingface.generation import split_cache
from longshort.huggingface.interface import Call, recording, within_sliding_window
from longshort.huggingface.state import NAME, store_layouts, stored_state, text_config
from longshort.layout import HeadLayout

_TOKENS = 8
_BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Differences of logits that pass for rounding, relative to the largest, by dtype."""


class AttentionLayer(NamedTuple):
    """What a trial pass found of a layer that attends.

    Attributes:
        index: its `layer_idx`.
        name: path of its module in the model.
        num_heads, num_kv_heads: as the attention sees them.
        head_dim, value_dim: of queries and keys, and of values.
        sliding_window: the layer's own window, or None.
    """

    index: int
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None


def apply(
    model: nn.Module,
    layouts: Sequence[HeadLayout | None] | None = None,
    *,
    num_global_heads: int | Sequence[int] | None = None,
    window: int | Sequence[int] | None = None,
    sink_tokens: int = 0,
) -> list[HeadLayout | None]:
    """Let the layers of a causal decoder of transformers attend by layouts, in place.

        apply(model, num_global_heads=4, window=256, sink_tokens=4)
        apply(model, layouts=[HeadLayout(...), None, ...])

    The model keeps its weights, and its attention implementation becomes "longshort". Layouts are saved with
    the config and loaded again, once `longshort.huggingface` is imported. `generate()` uses a `SplitCache`.
    A later call replaces the layouts. Layouts combine with a layer's own sliding window: each head gets the
    shorter window, and no sink tokens, which the layer does not see either.

    A trial on 8 tokens comes first: with all heads global the logits must be the model's own, to rounding;
    with the layouts they must be the same with and without a cache. No random state moves.

    Args:
        model: a `PreTrainedModel`, with its weights; a model that also sees or hears gets layouts in its
            decoder.
        layouts: for each layer its layout, None where it does not attend. The number of kv_heads is what the
            attention sees: all heads where a model repeats them before.
        num_global_heads: instead of layouts: the last heads of each layer see everything; one number, or one
            per layer. A multiple of the number of query heads that share a KV head.
        window: keys that a local head's query sees, itself included; one number, or one per layer.
        sink_tokens: number of first keys of each sequence that local heads see too.

    Returns:
        The layouts as they were stored, those of sliding layers shortened.

    Raises:
        TypeError: model is no model of transformers, or an entry of layouts no HeadLayout.
        ValueError: an argument is not allowed, or the model attends in a way that layouts cannot replace; the
            message names the layer and the reason, and the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    config = text_config(model)
    count = _number_of_layers(config)
    wanted = _checked_arguments(count, layouts, num_global_heads, window, sink_tokens)
    _require_dispatch(model, config)
    with _unchanged_on_error(model, config), _undisturbed(model):
        layers = _trial(model, config)
        found = _fitted(layers, count, wanted, sink_tokens)
        state = stored_state(config)
        replaces = config._attn_implementation if state is None else state["replaces"]
        _set_implementation(model, config, NAME)
        store_layouts(config, found, replaces or "sdpa", _cache_refusal(layers))
        store_layouts(config, found, replaces or "sdpa", _require_same_with_cache(model))
    return found


def remove(model: nn.Module) -> None:
    """Take layouts away again: the model attends as before `apply`, in place.

    Raises:
        TypeError: model is no model of transformers.
        ValueError: it has no layouts.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    config = text_config(model)
    state = stored_state(config)
    if state is None:
        raise ValueError(f"model must have layouts to remove, got {type(model).__name__} without")
    delattr(config, NAME)
    _set_implementation(model, config, state["replaces"])


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Return the layers of a decoder that attend, by a pass of 8 tokens that changes nothing.

    Raises:
        ValueError: the model attends in a way that layouts cannot replace.
    """
    config = text_config(model)
    _require_dispatch(model, config)
    with _undisturbed(model):
        return _trial(model, config)


def _number_of_layers(config: Any) -> int:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder, got an encoder-decoder, {type(config).__name__}")
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(f"the config must say num_hidden_layers, got {type(config).__name__} without")
    return count


class _Wanted(NamedTuple):
    """What the caller asks of each layer: layouts, or heads and windows."""

    layouts: Sequence[HeadLayout | None] | None
    num_global: Sequence[int]
    windows: Sequence[int]


def _checked_arguments(
    count: int, layouts: Any, num_global_heads: Any, window: Any, sink_tokens: Any
) -> _Wanted:
    require_integer("sink_tokens", sink_tokens, minimum=0)
    if layouts is not None:
        if num_global_heads is not None or window is not None or sink_tokens:
            raise ValueError("layouts must come alone, got num_global_heads, window or sink_tokens too")
        if isinstance(layouts, HeadLayout | str) or not isinstance(layouts, Sequence):
            raise TypeError(f"layouts must be a list, one entry per layer, got {type(layouts).__name__}")
        if len(layouts) != count:
            raise ValueError(
                f"layouts must have one entry for each of the {count} layers, got {len(layouts)}"
            )
        for index, layout in enumerate(layouts):
            if layout is not None and not isinstance(layout, HeadLayout):
                raise TypeError(
                    f"layouts must hold HeadLayouts or None, got {type(layout).__name__} for layer {index}"
                )
        return _Wanted(layouts, (), ())
    if num_global_heads is None or window is None:
        raise ValueError("apply needs layouts, or num_global_heads and window")
    return _Wanted(
        None,
        _per_layer("num_global_heads", num_global_heads, count, minimum=0),
        _per_layer("window", window, count, minimum=1),
    )


def _per_layer(name: str, value: Any, count: int, minimum: int) -> Sequence[int]:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * count
    if len(values) != count:
        raise ValueError(f"{name} must have one entry for each of the {count} layers, got {len(values)}")
    for entry in values:
        require_integer(name, entry, minimum=minimum)
    return values


def _require_dispatch(model: PreTrainedModel, config: Any) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must have its weights, got parameters on the meta device")
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    decoders = [module for module in owners if module.config is config] or [model]
    for decoder in decoders:
        if not decoder._can_set_attn_implementation():
            raise ValueError(
                f"{type(decoder).__name__} cannot attend by layouts: its layers do not dispatch attention "
                "through transformers' AttentionInterface"
            )


def _set_implementation(model: PreTrainedModel, config: Any, name: str) -> None:
    """Set the attention implementation of the decoder, not of what else is in the model."""
    if model.config is config:
        model.set_attn_implementation(name)
        return
    keys = [key for key in model.config.sub_configs if getattr(model.config, key) is config]
    model.set_attn_implementation(dict.fromkeys(keys, name))


@contextmanager
def _unchanged_on_error(model: PreTrainedModel, config: Any) -> Iterator[None]:
    implementation, state = config._attn_implementation, stored_state(config)
    try:
        yield
    except BaseException:
        if state is None:
            config.__dict__.pop(NAME, None)
        else:
            setattr(config, NAME, state)
        _set_implementation(model, config, implementation)
        raise


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Put modes, buffers and random states back after trial passes, which compute no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, held in buffers:
                buffer.copy_(held)


def _logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    try:
        output = model(input_ids=ids, **options)
    except ValueError:
        raise
    except Exception as error:  # the model's own code, such as one that needs a mask per query and key
        raise ValueError(f"{type(model).__name__} fails on a trial of {_TOKENS} tokens: {error!r}") from error
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def _trial_tokens(model: PreTrainedModel, config: Any) -> Tensor:
    device: Any = model.get_input_embeddings().weight.device
    return torch.arange(3, 3 + _TOKENS, device=device)[None] % config.vocab_size


def _trial(model: PreTrainedModel, config: Any) -> list[AttentionLayer]:
    """Attend with all heads global; find the layers, and refuse a model whose logits are others then."""
    ids = _trial_tokens(model, config)
    implementation = config._attn_implementation
    state = config.__dict__.pop(NAME, None)
    try:
        if implementation == NAME:  # layouts were applied before
            assert state is not None
            _set_implementation(model, config, state["replaces"])
        model.eval()
        truth = _logits(model, ids, use_cache=False)
        _set_implementation(model, config, NAME)
        calls, logits = _recorded(model, ids)
        layers = _checked_layers(model, config, calls)
        _require_alike("with all heads global", logits, truth)
        model.train()
        for call in _recorded(model, ids)[0]:
            if call.dropout:
                raise ValueError(
                    f"{_path(model, call.module)} drops attention probabilities in training "
                    f"(p = {call.dropout}), which layouts do not support; set attention_dropout to 0"
                )
    finally:
        _set_implementation(model, config, implementation)
        if state is not None:
            setattr(config, NAME, state)
    return layers


def _recorded(model: PreTrainedModel, ids: Tensor) -> tuple[list[Call], Tensor]:
    """The calls of attention in one pass with all heads global, and the logits."""
    calls: list[Call] = []

    def all_global(call: Call) -> HeadLayout:
        calls.append(call)
        layout = HeadLayout((None,) * call.num_heads, call.num_kv_heads)
        return within_sliding_window(layout, call.sliding_window)

    with recording(all_global):
        logits = _logits(model, ids, use_cache=False)
    return calls, logits


def _path(model: nn.Module, module: nn.Module) -> str:
    names = {id(found): name for name, found in model.named_modules()}
    return f"{names.get(id(module), 'a module outside of the model')} ({type(module).__name__})"


def _checked_layers(model: PreTrainedModel, config: Any, calls: Sequence[Call]) -> list[AttentionLayer]:
    if not calls:
        raise ValueError(
            f"{type(model).__name__} cannot attend by layouts: no layer calls the AttentionInterface"
        )
    kinds, settings = get_layer_types_and_kwargs(config)
    layers: dict[int, AttentionLayer] = {}
    for call in calls:
        path = _path(model, call.module)
        index = getattr(call.module, "layer_idx", None)
        if not isinstance(index, int) or not 0 <= index < len(kinds):
            raise ValueError(
                f"{path} cannot attend by a layout: it has layer_idx = {index!r}, not one of {len(kinds)}"
            )
        if getattr(call.module, "config", None) is not config:
            raise ValueError(f"{path} cannot attend by a layout: it does not hold the decoder's config")
        if index in layers:
            raise ValueError(f"{path} cannot attend by a layout: layer {index} attends more than once")
        if "sliding" in kinds[index] and call.sliding_window is None:
            raise ValueError(
                f"{path} cannot attend by a layout: by the config its sliding window is "
                f"{settings[index].get('sliding_window')}, which it does not pass to the attention"
            )
        layers[index] = AttentionLayer(
            index, path, call.num_heads, call.num_kv_heads, call.head_dim, call.value_dim, call.sliding_window
        )
    return [layers[index] for index in sorted(layers)]


def _fitted(
    layers: Sequence[AttentionLayer], count: int, wanted: _Wanted, sink_tokens: int
) -> list[HeadLayout | None]:
    """The layouts of all layers, checked against what the layers are."""
    found: list[HeadLayout | None] = [None] * count
    for layer in layers:
        if wanted.layouts is None:
            try:
                layout = HeadLayout.split(
                    layer.num_heads, wanted.num_global[layer.index], wanted.windows[layer.index],
                    layer.num_kv_heads, sink_tokens,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{error}; in {layer.name}") from error
        else:
            layout = wanted.layouts[layer.index]
            if layout is None:
                raise ValueError(f"layouts must have a HeadLayout for {layer.name}, which attends, got None")
            held, needed = (layout.num_heads, layout.num_kv_heads), (layer.num_heads, layer.num_kv_heads)
            if held != needed:
                raise ValueError(
                    f"the layout of {layer.name} must have its (heads, kv_heads) = {needed}, got {held}"
                )
        found[layer.index] = within_sliding_window(layout, layer.sliding_window)
    for index, layout in enumerate(wanted.layouts or ()):
        if layout is not None and found[index] is None:
            raise ValueError(
                f"layouts must have None for layer {index}, which does not attend, got {layout!r}"
            )
    return found


def _cache_refusal(layers: Sequence[AttentionLayer]) -> str | None:
    for layer in layers:
        if layer.head_dim != layer.value_dim:
            return (
                f"{layer.name} has keys of head_dim {layer.head_dim} and values of {layer.value_dim}, as "
                "multi-head latent attention has them, whose cache holds no heads"
            )
    return None


def _require_same_with_cache(model: PreTrainedModel) -> str | None:
    """Refuse a model whose logits depend on whether keys are cached, and how.

    Returns:
        Why a `SplitCache` cannot serve the model; None if it can.
    """
    config = text_config(model)
    ids = _trial_tokens(model, config)
    model.eval()
    truth = _logits(model, ids, use_cache=False)
    caches: dict[str, Cache] = {"with a DynamicCache": DynamicCache(config=config)}
    state = stored_state(config)
    assert state is not None
    refusal = state["cache"]
    if refusal is None:
        caches["with a SplitCache"] = split_cache(model)
    for how, cache in caches.items():
        parts = ids.split([_TOKENS - 3, 1, 2], dim=1)
        try:
            logits = [_logits(model, part, past_key_values=cache, use_cache=True) for part in parts]
        except ValueError as error:
            if isinstance(error.__cause__, TypeError) and isinstance(cache, SplitCache):
                return f"{type(model).__name__} works on keys that come out of the cache"
            raise ValueError(f"{type(model).__name__} cannot attend by layouts {how}: {error}") from error
        _require_alike(how, torch.cat(logits, dim=1), truth)
    return refusal


def _require_alike(how: str, logits: Tensor, truth: Tensor) -> None:
    bound = _BOUNDS.get(truth.dtype, 1e-4) * truth.abs().max().item()
    error = (logits - truth).abs().max().item()
    if not error <= bound:
        raise ValueError(
            f"the model cannot attend by layouts: {how} its logits differ by {error:.1e} from what they "
            f"were, more than the {bound:.1e} of rounding"
        )

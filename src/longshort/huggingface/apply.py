"""`apply()`: layouts for the layers of any decoder of transformers, after a trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from longshort.checks import require_integer
from longshort.huggingface.interface import within_sliding_window
from longshort.huggingface.state import NAME, store_layouts, stored_state, text_config
from longshort.huggingface.trial import (
    AttentionLayer,
    cache_refusal,
    own_implementation,
    require_dispatch,
    restore_implementation,
    set_implementation,
    try_all_global,
    try_with_caches,
    undisturbed,
)
from longshort.layout import HeadLayout


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
    shorter window, and no sink tokens, which the layer itself does not see; nor do layers that attend in
    chunks have sink tokens.

    A trial on 8 tokens comes first: with all heads global the logits must be the model's own, to rounding;
    with the layouts they must be the same with and without a cache. Random states stay as they are.

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
            message names the layer and the reason, and the model is unchanged.
    """
    model = _checked_model(model)
    config = text_config(model)
    count = _number_of_layers(config)
    wanted = _checked_arguments(count, layouts, num_global_heads, window, sink_tokens)
    require_dispatch(model, config)
    with _unchanged_on_error(model, config), undisturbed(model):
        layers = try_all_global(model, config)
        found = _fitted(layers, count, wanted, sink_tokens)
        replaces = own_implementation(config)
        set_implementation(model, config, NAME)
        store_layouts(config, found, replaces, cache_refusal(layers))
        store_layouts(config, found, replaces, try_with_caches(model))
    return found


def remove(model: nn.Module) -> None:
    """Take layouts away again, in place: the model attends as before `apply`, or by SDPA or eager attention
    if that implementation is not available here.

    Raises:
        TypeError: model is no model of transformers.
        ValueError: it has no layouts.
    """
    model = _checked_model(model)
    config = text_config(model)
    if stored_state(config) is None:
        raise ValueError(f"model must have layouts to remove, got {type(model).__name__} without")
    restore_implementation(model, config)
    delattr(config, NAME)


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Return the layers of a decoder that attend, found in a pass of 8 tokens that changes nothing.

    Raises:
        ValueError: the model attends in a way that layouts cannot replace.
    """
    config = text_config(model)
    require_dispatch(model, config)
    with undisturbed(model):
        return try_all_global(model, config)


def _checked_model(model: Any) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, got {type(model).__name__}; call this "
            "before the model is wrapped, as by torch.compile, PEFT, DDP or FSDP"
        )
    return model


def _number_of_layers(config: Any) -> int:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder, got an encoder-decoder, {type(config).__name__}")
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(f"the config must say num_hidden_layers, got {type(config).__name__} without")
    return count


class _Wanted(NamedTuple):
    """The layouts that the caller asks for, or the heads and windows."""

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
        raise ValueError(
            f"apply needs layouts, or num_global_heads and window, got num_global_heads="
            f"{num_global_heads} and window={window}"
        )
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
        set_implementation(model, config, implementation)
        raise


def _fitted(
    layers: Sequence[AttentionLayer], count: int, wanted: _Wanted, sink_tokens: int
) -> list[HeadLayout | None]:
    """Return the layouts of all layers, checked against the layers' heads and windows."""
    found: list[HeadLayout | None] = [None] * count
    for layer in layers:
        if wanted.layouts is None:
            try:
                layout = HeadLayout.split(
                    layer.num_heads, wanted.num_global[layer.index], wanted.windows[layer.index],
                    layer.num_kv_heads, sink_tokens,
                )  # fmt: skip
            except ValueError as error:
                reason = str(error).replace("num_global ", "num_global_heads ")
                raise ValueError(f"{reason}; in {layer.name}") from error
        else:
            layout = wanted.layouts[layer.index]
            if layout is None:
                raise ValueError(f"layouts must have a HeadLayout for {layer.name}, which attends, got None")
            held, needed = (layout.num_heads, layout.num_kv_heads), (layer.num_heads, layer.num_kv_heads)
            if held != needed:
                raise ValueError(
                    f"the layout of {layer.name} must have its (heads, kv_heads) = {needed}, got {held}"
                )
        layout = within_sliding_window(layout, layer.sliding_window)
        if layer.is_chunked:  # its queries cannot see the first keys of the sequence
            layout = HeadLayout(layout.windows, layout.num_kv_heads)
        found[layer.index] = layout
    for index, layout in enumerate(wanted.layouts or ()):
        if layout is not None and found[index] is None:
            raise ValueError(
                f"layouts must have None for layer {index}, which does not attend, got {layout!r}"
            )
    return found

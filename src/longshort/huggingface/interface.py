"""Attention by layouts for the decoders of transformers: what its registries call "longshort"."""

from __future__ import annotations

import ast
import copy
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from longshort.attention import attention
from longshort.huggingface.cache import PendingKeys, PendingValues
from longshort.huggingface.dispatch import layer_name
from longshort.huggingface.segments import segment_ids_of_call
from longshort.huggingface.state import NAMES, layer_data, layout_from
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


CONTEXT = "longshort_context"
"""The attribute of a layer whose attention goes across ranks: a `longshort.distributed.ContextParallel`."""


class Call(NamedTuple):
    """What a layer asked of the attention function.

    Attributes:
        module: the layer.
        num_heads, num_kv_heads, head_dim, value_dim: sizes of its tensors.
        sliding_window: the layer's own window, or None.
        dropout: probability.
    """

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None
    dropout: float


_recorder: ContextVar[Callable[[Call], HeadLayout] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(recorder: Callable[[Call], HeadLayout]) -> Iterator[None]:
    """Hand every call of this thread inside to `recorder`, which returns the layout to attend with."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def attend_by_layout(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PendingKeys,
    value: Tensor | PendingValues,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend with the layout of the module's layer, as transformers calls an attention implementation.

    Args:
        module: has the decoder's `config` and a `layer_idx`.
        query: (batch, heads, q_len, head_dim).
        key, value: (batch, kv_heads, kv_len, head_dim), the cached ones first; or what a `SplitCache` gave.
            Values may have another head_dim.
        attention_mask: what `segments_of_mask` gave.
        dropout: must be 0.
        scaling: None is 1/sqrt(head_dim).
        sliding_window: shortens the layout's windows.
        softcap: as in `longshort.attention`.
        s_aux: logits of the sinks, (heads,).
        position_ids: without cached keys, positions that fall begin a new sequence.
        cu_seq_lens_q: (sequences + 1,), the bounds of packed sequences in a batch of 1.
        is_causal: must not be False; None: as the module says.
        output_attentions: must be false.
        unused: what other implementations take.

    Returns:
        (batch, q_len, heads, head_dim of values), and None in place of probabilities.

    Raises:
        TypeError: a cache gave keys that only it can read.
        ValueError: an argument is not allowed, or does not fit the layout.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{layer_name(module)} must be causal to attend by a layout, got is_causal=False")
    if output_attentions:
        raise ValueError("output_attentions must be false: no attention matrix is ever held")
    pending = None
    if isinstance(key, PendingKeys) or isinstance(value, PendingValues):
        pending, key, value = _taken(module, key, value)
    sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    call = Call(module, *sizes, sliding_window, dropout)
    recorder = None if torch.compiler.is_compiling() else _recorder.get()
    layout = _layout_of(call) if recorder is None else recorder(call)
    if dropout and recorder is None:
        raise ValueError(
            f"attention_dropout must be 0: dropout on probabilities is not supported, got {dropout} in "
            f"{layer_name(module)}"
        )
    batch, _, q_len, _ = query.shape
    past = 0 if pending is None else pending.cache.length
    options: dict[str, Any] = {
        "scale": query.shape[3] ** -0.5 if scaling is None else float(scaling),
        "softcap": softcap,
        "sink_logits": s_aux,
        "segment_ids": segment_ids_of_call(
            attention_mask, position_ids, cu_seq_lens_q, (batch, q_len, past + key.shape[2]), query.device
        ),
    }
    query, key, value, value_dim = _with_one_head_dim(query, key, value)
    context = getattr(module, CONTEXT, None) if recorder is None else None
    if context is not None:
        if pending is not None or key.shape[2] != q_len:
            raise ValueError("past_key_values do not go with a sequence cut across ranks: use_cache=False")
        out = context(query, key, value, layout, **options)
    elif pending is None:
        out = attention(query, key, value, layout, **options)
    else:
        out = pending.attend(query, key, value, layout, options)
    return out[..., :value_dim].transpose(1, 2), None


def segments_of_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    use_vmap: bool = False,
    **unused: Any,
) -> Tensor | None:
    """Return segment ids in place of a mask, as transformers calls a mask function.

    A sequence begins where a key does not see the key before it, which is asked of `mask_function` for each
    key, in O(kv_length). Windows come to attention by themselves.

    Args:
        batch_size, q_length, kv_length: sizes of the attention.
        q_offset, kv_offset: positions of the first query and key.
        mask_function: a function of the indices of batch, head, query and key.
        attention_mask: (batch, tokens), True for tokens, False for padding.
        device: the device of the ids.
        use_vmap: whether the mask function is more than causal: the model, or transformers, added to it.
        unused: what other mask functions take.

    Returns:
        int64, (batch, 1, 1, kv_length), -1 for padding; None where nothing is padded and nothing is packed.

    Raises:
        ValueError: the mask cannot be expressed by segments, or the cache is longer than its tokens.
    """
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            "past_key_values must hold as many keys as tokens, as SplitCache and DynamicCache do; got a "
            f"cache of fixed length: {kv_length} keys for {q_length} new tokens"
        )
    if use_vmap and not torch.compiler.is_compiling() and not _is_of_transformers(mask_function):
        raise ValueError(
            "the model must use a causal mask, with padding, packing or sliding windows; got a mask function "
            "of its own, which a layout cannot express"
        )
    visible = _visible_tokens(attention_mask, kv_length)
    starts = None
    if mask_function is not causal_mask_function:
        starts = _sequence_starts(mask_function, batch_size, kv_length, kv_offset, device)
    if starts is None:
        return None if visible is None else (visible.to(torch.int64) - 1)[:, None, None]
    ids = starts.cumsum(-1) - 1  # 0 for a single segment, as without starts
    if visible is not None:
        ids = ids.masked_fill(~visible, -1)
    return ids[:, None, None]


def register() -> None:
    """Enter both functions into the registries of transformers."""
    for name in NAMES:
        AttentionInterface.register(name, attend_by_layout)
        AttentionMaskInterface.register(name, segments_of_mask)


def _taken(module: nn.Module, key: Any, value: Any) -> tuple[PendingKeys, Tensor, Tensor]:
    if not isinstance(key, PendingKeys) or not isinstance(value, PendingValues):
        raise TypeError(
            "past_key_values is a SplitCache, whose keys and values must reach the attention as they are, "
            f"got {type(key).__name__} and {type(value).__name__} in {layer_name(module)}"
        )
    return key, *key.take(value)


def _layout_of(call: Call) -> HeadLayout:
    layout = _stored_layout(call.module, call.sliding_window)
    held, wanted = (layout.num_heads, layout.num_kv_heads), (call.num_heads, call.num_kv_heads)
    if held != wanted:
        raise ValueError(
            f"the layout of {layer_name(call.module)} must have its (heads, kv_heads) = {wanted}, got {held}"
        )
    return layout


def within_sliding_window(layout: HeadLayout, sliding_window: int | None) -> HeadLayout:
    """Return the layout of heads that see what both a layout and their layer's sliding window show."""
    if sliding_window is None:
        return layout
    windows = tuple(sliding_window if w is None else min(w, sliding_window) for w in layout.windows)
    return HeadLayout(windows, layout.num_kv_heads)


def _stored_layout(module: nn.Module, sliding_window: int | None) -> HeadLayout:
    """Return the layout in the module's config, which is checked once."""
    data = layer_data(getattr(module, "config", None), getattr(module, "layer_idx", None))
    if torch.compiler.is_compiling():
        # A graph cannot make a layout. It can read an attribute, but before torch 2.12 none that its module
        # got while it was traced. Guards on the data make a new graph after a change.
        name = repr((data, sliding_window))
        _make_layout_for_graph(name, layer_name(module))
        return getattr(_LayoutsOfGraphs, name)
    if module.__dict__.get("_longshort_data") != (data, sliding_window):
        layout = _checked_layout(data, sliding_window, layer_name(module))
        module.__dict__["_longshort_layout"] = layout
        module.__dict__["_longshort_data"] = copy.deepcopy(data), sliding_window
    return module._longshort_layout  # pyright: ignore[reportReturnType]


def _checked_layout(data: Any, sliding_window: int | None, layer: str) -> HeadLayout:
    layout = layout_from(data)
    if layout is None:
        raise ValueError(f"{layer} attends, but config.longshort has no layout for it")
    if not layout.equals(within_sliding_window(layout, sliding_window)):
        raise ValueError(
            f"the layout of {layer} must stay within the layer's own sliding window of "
            f"{sliding_window}, got {layout!r}; apply layouts again after a change of the window"
        )
    return layout


class _LayoutsOfGraphs:
    """The attributes are layouts, each by the `repr` of the data and the sliding window of its layer."""


@torch.compiler.assume_constant_result
def _make_layout_for_graph(name: str, layer: str) -> bool:
    """Make a layout while a graph is traced. Return True, since the result must be a constant."""
    data, sliding_window = ast.literal_eval(name)
    setattr(_LayoutsOfGraphs, name, _checked_layout(data, sliding_window, layer))
    return True


def _is_of_transformers(mask_function: Callable[..., Any]) -> bool:
    """Return whether a mask function is made of those alone that transformers has, which take indices of any
    shape and hide what neighbours tell."""
    if getattr(mask_function, "__module__", None) != causal_mask_function.__module__:
        return False
    contents = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    parts = [
        part for x in contents for part in (x if isinstance(x, tuple | list) else (x,)) if callable(part)
    ]
    return all(isinstance(part, Tensor) or _is_of_transformers(part) for part in parts)


def _visible_tokens(attention_mask: Tensor | None, kv_length: int) -> Tensor | None:
    """The mask of the keys' tokens; None where it hides nothing."""
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_length:
        raise ValueError(
            f"attention_mask must have an entry for each of the {kv_length} keys, cached ones included, got "
            f"{attention_mask.shape[1]}"
        )
    visible = attention_mask[:, -kv_length:].to(torch.bool)
    return None if not torch.compiler.is_compiling() and bool(visible.all()) else visible


def _sequence_starts(
    mask_function: Callable[..., Any],
    batch: int,
    kv_length: int,
    first: int,
    device: torch.device | str | None,
) -> Tensor | None:
    """Where keys begin a sequence, (batch, kv_length); None where only the first does."""
    index = torch.arange(batch, device=device)[:, None]
    later = torch.arange(first + 1, first + kv_length, device=device)[None]
    sees_last = mask_function(index, 0, later, later - 1).expand(batch, kv_length - 1)
    sees_next = mask_function(index, 0, later - 1, later).expand(batch, kv_length - 1)
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(~sees_next.any(), "the model must be causal to attend by a layout")
    else:
        all_one, looks_ahead = torch.stack([sees_last.all(), sees_next.any()]).tolist()
        if looks_ahead:
            raise ValueError(
                "the model must be causal to attend by a layout, got a mask that shows later keys, as the "
                "tokens of an image may have (token_type_ids)"
            )
        if all_one:
            return None
    return F.pad(~sees_last, (1, 0), value=True)


def _with_one_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Fill up values, or queries and keys, with zeros, which change no score and no other output."""
    head_dim, value_dim = q.shape[3], v.shape[3]
    if value_dim < head_dim:
        v = F.pad(v, (0, head_dim - value_dim))
    elif head_dim < value_dim:
        q, k = (F.pad(x, (0, value_dim - head_dim)) for x in (q, k))
    return q, k, v, value_dim

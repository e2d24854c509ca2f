"""Translation of attention calls of each implementation of transformers into visible pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from longshort.huggingface.dispatch import EAGER, AttentionCall
from longshort.huggingface.interface import within_sliding_window
from longshort.huggingface.segments import segment_ids_between, segment_ids_of_call
from longshort.huggingface.state import NAMES, layer_data, layout_from
from longshort.huggingface.visibility import HeadWindows, Visibility
from longshort.layers import Observation
from longshort.layout import HeadLayout


def visibility_of(call: AttentionCall) -> Visibility:
    """Return the pairs that the implementation of a call lets see each other.

    - eager and flex_attention: those that the mask shows; without a mask, all.
    - sdpa: likewise; without a mask, if causal, key j is seen by query i where j <= i, counted from the
      first.
    - flash attention, and implementations that transformers does not know: a 2-D mask marks padding, and
      `cu_seq_lens_q` and `cu_seq_lens_k`, or positions that restart in a batch of 1, separate packed
      sequences; the last query is aligned with the last key; `sliding_window` counts. Of a 4-D mask nothing
      else counts, as for eager.
    - longshort: the same with the windows of `config.longshort`, and a mask that holds segment ids.

    Raises:
        ValueError: the mask is none of these, or the call updates a paged cache.
    """
    if call.options.get("cache") is not None:
        raise ValueError(f"{call.name} must not use a paged cache (continuous batching) to be watched")
    batch, num_heads, q_len, _ = call.q.shape
    kv_len, device = call.k.shape[2], call.q.device
    everything = (HeadWindows(tuple(range(num_heads)), None),)
    bias = call.options.get("position_bias")
    masks = () if bias is None else (bias,)
    mask = call.mask
    if isinstance(mask, BlockMask):
        return Visibility(q_len, kv_len, device, everything, masks=masks, rule=mask.mask_mod)
    if call.implementation in NAMES:
        return _by_layout(call)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return Visibility(q_len, kv_len, device, everything, masks=(mask, *masks))
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (batch, kv_len)):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask of {call.name} must be None, (batch, kv_len) = {(batch, kv_len)}, 4-D or a "
            f"BlockMask to be watched, got {shape}"
        )
    if mask is None and call.implementation in (EAGER, "flex_attention"):
        return Visibility(q_len, kv_len, device, everything, masks=masks)
    causal = _is_causal(call)
    if mask is None and call.implementation == "sdpa":
        return Visibility(q_len, kv_len, device, everything, causal=causal and q_len > 1, masks=masks)
    heads = (HeadWindows(tuple(range(num_heads)), _sliding_window(call)),)
    return Visibility(
        q_len, kv_len, device, heads, causal=causal, past=kv_len - q_len, segment_ids=_flash_segments(call),
        masks=masks,
    )  # fmt: skip


def windows_of(call: AttentionCall) -> tuple[int | None, ...]:
    """Return the window of each query head: that of its layout or the layer's sliding window; None:
    global."""
    if call.implementation in NAMES:
        return _layout(call).windows
    return (_sliding_window(call),) * call.q.shape[1]


def _sliding_window(call: AttentionCall) -> int | None:
    window = call.options.get("sliding_window")
    return window if isinstance(window, int) and not isinstance(window, bool) else None


def _is_causal(call: AttentionCall) -> bool:
    given = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if given is None else given)


def _layout(call: AttentionCall) -> HeadLayout:
    """Return the layout of a longshort layer, within its sliding window."""
    layout = layout_from(layer_data(call.module.config, call.module.layer_idx))
    assert layout is not None
    return within_sliding_window(layout, _sliding_window(call))


def _by_layout(call: AttentionCall) -> Visibility:
    batch, _, q_len, _ = call.q.shape
    ids = segment_ids_of_call(
        call.mask, call.options.get("position_ids"), call.options.get("cu_seq_lens_q"),
        (batch, q_len, call.k.shape[2]), call.q.device,
    )  # fmt: skip
    return _causal_visibility(call.q, call.k, _layout(call), ids)


def layout_visibility(observation: Observation, layout: HeadLayout) -> Visibility:
    """Return the pairs that see each other in a call of `LongShortAttention`."""
    ids, slopes = (observation.options.get(name) for name in ("segment_ids", "alibi_slopes"))
    return _causal_visibility(observation.q, observation.k, layout, ids, slopes)


def _causal_visibility(
    q: Tensor, k: Tensor, layout: HeadLayout, segment_ids: Tensor | None, slopes: Tensor | None = None
) -> Visibility:
    groups = tuple(HeadWindows(group.heads, group.window) for group in layout.groups)
    q_len, kv_len = q.shape[2], k.shape[2]
    return Visibility(
        q_len, kv_len, q.device, groups, causal=True, past=kv_len - q_len, sink_tokens=layout.sink_tokens,
        segment_ids=segment_ids, slopes=slopes,
    )  # fmt: skip


def _flash_segments(call: AttentionCall) -> Tensor | None:
    batch, _, q_len, _ = call.q.shape
    kv_len, device = call.k.shape[2], call.q.device
    if call.mask is not None:
        return (call.mask != 0).to(device, torch.int64) - 1
    q_bounds, k_bounds = (call.options.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    if q_bounds is not None and k_bounds is not None:
        if q_len != kv_len or not torch.equal(q_bounds, k_bounds):
            raise ValueError(
                f"cu_seq_lens_q of {call.name} must equal cu_seq_lens_k to be watched, got {q_len} queries "
                f"and {kv_len} keys with unequal bounds"
            )
        return segment_ids_between(q_bounds, batch, kv_len, device)
    positions = call.options.get("position_ids")
    if positions is None or batch != 1 or q_len != kv_len or positions.shape[-1] in (0, 1):
        return None
    positions = positions.reshape(-1)
    starts = positions == positions.min()  # the rule of transformers
    return starts.cumsum(-1)[None].to(device) if int(starts.sum()) > 1 else None

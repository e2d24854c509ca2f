"""FlexAttention of PyTorch with the layout as a block mask: a second oracle on GPUs, by name only.

The block mask is found by arithmetic on blocks, without an array of pairs, and kept for the next call. It
belongs to the layout; segment ids are data, which `mask_mod` reads for each pair of the blocks.

FlexAttention multiplies the values of hidden pairs by 0, so that a NaN or inf that a row does not see can
reach it. No other backend lets that happen, which is one reason why `auto` never takes this one.
"""

from __future__ import annotations

import importlib.util
from copy import copy
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from longshort.backends import operators
from longshort.backends.call import AttentionCall, Output
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Int

_BLOCK = 128  # queries and keys of a block, FlexAttention's default
_SMALLEST_HEAD_DIM = 16  # on a GPU
_MASKS = 4  # block masks in memory; 12 heads of 131,072 tokens take 0.2 GB each
_SIZES = 256  # calls of different sizes or options that are compiled, before that is an error
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def supports(call: AttentionCall) -> str | None:
    """Return why FlexAttention cannot serve a call, or None."""
    q, device = call.q, call.q.device.type
    if device not in ("cpu", "cuda"):
        return f"the tensors are on {device}, not on a CPU or GPU"
    if q.dtype == torch.float64:
        return f"q is {q.dtype}; FlexAttention computes float32, bfloat16 and float16"
    if call.round_probabilities:
        return "FlexAttention rounds probabilities in a way of its own"
    if call.with_stats:
        return "FlexAttention has no entropy, and of the logits the largest, not the largest magnitude"
    if device == "cpu":
        if any(x.requires_grad for x in (q, call.k, call.v)):
            return "FlexAttention has no backward pass on a CPU"
        if call.with_lse:
            return "FlexAttention compiled for a CPU returns no lse"
    else:
        if q.shape[3] < _SMALLEST_HEAD_DIM:
            return f"head_dim is {q.shape[3]}; FlexAttention takes at least {_SMALLEST_HEAD_DIM} on a GPU"
        if not _HAS_TRITON:
            return "triton is not installed"
    if torch.compiler.is_compiling():
        return "FlexAttention is compiled by itself, not in another graph"
    if operators.forward_mode_is_on():
        return operators.NO_TANGENTS
    if operators.transforms_are_active():
        return "FlexAttention does not work under the transforms of torch.func"
    return None


def attend(call: AttentionCall) -> Output:
    """Compute the attention of all heads by compiled FlexAttention; each new size is compiled, in seconds."""
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    ids, device = call.segment_ids, call.q.device
    mask = block_mask(call.layout, q_len, kv_len, call.causal, ids is not None, device)
    if ids is not None:
        sinks = call.layout.sink_tokens
        reach = _reach(call.layout, kv_len, device)
        mask = copy(mask)
        mask.mask_mod = _mask_mod(reach, kv_len - q_len, call.causal, sinks and _first_keys(ids, sinks), ids)
    found = _compiled(
        call.q,
        call.k,
        call.v,
        score_mod=_score_mod(call),
        block_mask=mask,
        scale=call.scale,
        enable_gqa=call.layout.group_size > 1,
        return_aux=AuxRequest(lse=True) if call.with_lse else None,
    )
    out, lse = (found[0], found[1].lse) if call.with_lse else (found, None)
    if ids is not None:  # padding sees nothing, whatever FlexAttention makes of it
        padding = (ids[:, kv_len - q_len :] < 0)[:, None]
        out = out.masked_fill(padding[..., None], 0.0)
        lse = None if lse is None else lse.masked_fill(padding, -torch.inf)
    return Output(out.to(call.out_dtype), lse)


@lru_cache(maxsize=_MASKS)
@torch.inference_mode(False)  # a tensor that is made there could not be used in training
def block_mask(
    layout: HeadLayout, q_len: int, kv_len: int, causal: bool, segmented: bool, device: torch.device
) -> BlockMask:
    """Build the block mask of a layout; the last few are kept.

    Args:
        layout: windows of the query heads, and sink tokens.
        q_len, kv_len: number of queries and keys, aligned at the bottom right.
        causal: queries see no later key.
        segmented: every block is for a `mask_mod` of segments to decide, and the sink tokens may be anywhere.
        device: device of the mask.
    """
    reach, sinks = _reach(layout, kv_len, device), layout.sink_tokens
    partial, whole = _blocks(reach, sinks, q_len, kv_len, causal, segmented)
    return BlockMask.from_kv_blocks(
        *_lists(partial),
        *_lists(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_mask_mod(reach, kv_len - q_len, causal, sinks),
        seq_lengths=(q_len, kv_len),
    )


@lru_cache(maxsize=_MASKS)
@torch.inference_mode(False)
def _reach(layout: HeadLayout, kv_len: int, device: torch.device) -> Int[Tensor, " heads"]:
    windows = [kv_len if w is None else min(w, kv_len) for w in layout.windows]
    return torch.tensor(windows, dtype=torch.int32, device=device)


def _blocks(
    reach: Int[Tensor, " heads"], sinks: int, q_len: int, kv_len: int, causal: bool, segmented: bool
) -> tuple[Bool[Tensor, "heads rows columns"], Bool[Tensor, "heads rows columns"]]:
    """Mark the blocks of which some pairs are visible, and those of which all are.

    The distances from a query of a block to its keys are all the integers between those of its corners.
    """
    first_q, last_q = _ends(q_len, reach.device)
    first_k, last_k = _ends(kv_len, reach.device)
    offset = kv_len - q_len
    nearest = first_q[:, None] + offset - last_k
    farthest = last_q[:, None] + offset - first_k
    limits, places = reach.unique(return_inverse=True)  # heads of one window share the work
    limit = limits[:, None, None]
    has_sinks = first_k < sinks
    if segmented:  # the sink tokens of a segment may be anywhere
        has_sinks = torch.full_like(has_sinks, sinks > 0)
    seen = (nearest < limit) & (farthest > -limit) | has_sinks
    # a block that is cut off by the end of the sequence is not whole
    complete = (last_q - first_q == _BLOCK - 1)[:, None] & (last_k - first_k == _BLOCK - 1)
    beyond_sinks = last_q[:, None] + offset - first_k.clamp(min=sinks)
    whole = complete & ((nearest > -limit) & (beyond_sinks < limit) | (last_k < sinks))
    if causal:
        seen, whole = seen & (farthest >= 0), whole & (nearest >= 0)
    if segmented:
        whole = torch.zeros_like(whole)
    return (seen & ~whole)[places], whole[places]


def _ends(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and last positions of blocks."""
    first = torch.arange(0, length, _BLOCK, device=device)
    return first, (first + _BLOCK - 1).clamp(max=length - 1)


def _lists(
    blocks: Bool[Tensor, "heads rows columns"],
) -> tuple[Int[Tensor, "1 heads rows"], Int[Tensor, "1 heads rows columns"]]:
    """Count the blocks that are set in each row, and list their columns before those of the others."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return counts[None], columns.int()[None]


def _mask_mod(
    reach: Tensor, offset: int, causal: bool, sinks: int | Tensor, ids: Tensor | None = None
) -> Callable[..., Tensor]:
    """Make the rule of visibility of one pair.

    Args:
        reach: (heads,) window of each head.
        offset: position of the first query.
        causal: queries see no later key.
        sinks: number of first keys that all heads see, or (batch, kv_len) whether a key is one; 0 for none.
        ids: (batch, kv_len) segment ids.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        seen = (distance if causal else distance.abs()) < reach[head]
        if isinstance(sinks, Tensor):
            seen = seen | sinks[batch, key]
        elif sinks:
            seen = seen | (key < sinks)
        if causal:
            seen = seen & (distance >= 0)
        if ids is not None:
            own = ids[batch, query + offset]
            seen = seen & (own == ids[batch, key]) & (own >= 0)
        return seen

    return sees


def _first_keys(ids: Tensor, count: int) -> Bool[Tensor, "batch kv_len"]:
    """Mark the first keys of each segment."""
    sorted_ids, order = ids.sort(dim=-1, stable=True)
    places = torch.arange(ids.shape[1], device=ids.device)
    ranks = places - torch.searchsorted(sorted_ids, sorted_ids)
    return torch.zeros_like(ids, dtype=torch.bool).scatter(1, order, ranks < count)


def _score_mod(call: AttentionCall) -> Callable[..., Tensor] | None:
    softcap, slopes = call.softcap, call.alibi_slopes
    if softcap is None and slopes is None:
        return None
    offset = call.k.shape[2] - call.q.shape[2]

    def modify(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[head] * (query + offset - key).abs()
        return score

    return modify


def _compiled(*args: Any, **options: Any) -> Any:
    with torch._dynamo.config.patch(recompile_limit=_SIZES):
        return _compile()(*args, **options)


@cache
def _compile() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)

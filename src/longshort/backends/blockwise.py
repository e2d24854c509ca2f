"""Attention in tiles of queries with plain PyTorch: O(n·w) for local heads, any device, trains.

Local heads, and global heads with options that SDPA lacks, run through the operator of `tiled_operator`,
which computes one tile of scores at a time and recomputes it in the backward pass, so that no n×n tensor
ever exists. Global heads that SDPA's kernels can serve run through `sdpa_operator`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longshort.backends import operators, sdpa_operator
from longshort.backends.call import AttentionCall, Output
from longshort.backends.tiled_operator import tiled_attention
from longshort.layout import HeadGroup


def supports(call: AttentionCall) -> str | None:
    """Return why this backend cannot serve a call, or None."""
    return operators.NO_TANGENTS if operators.forward_mode_is_on() else None


def attend(call: AttentionCall) -> Output:
    """Compute each group of heads with one window; takes O(tile) memory beyond outputs and gradients."""
    groups = call.layout.groups
    if len(groups) == 1:
        return _attend_group(call, groups[0])
    parts = [_attend_group(_heads_of(call, group), group) for group in groups]
    order = [head for group in groups for head in group.heads]
    places = sorted(range(len(order)), key=order.__getitem__)

    def join(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        present = [x for x in tensors if x is not None]
        return _select(torch.cat(present, dim), tuple(places), dim) if present else None

    out = join([part.out for part in parts], 1)
    assert out is not None
    return Output(
        out,
        join([part.lse for part in parts], 1),
        join([part.max_logit for part in parts], 0),
        join([part.entropy for part in parts], 0),
    )


def _heads_of(call: AttentionCall, group: HeadGroup) -> AttentionCall:
    slopes = call.alibi_slopes
    return replace(
        call,
        q=_select(call.q, group.heads, 1),
        k=_select(call.k, group.kv_heads, 1),
        v=_select(call.v, group.kv_heads, 1),
        alibi_slopes=None if slopes is None else _select(slopes, group.heads, 0),
    )


def _select(x: Tensor, heads: tuple[int, ...], dim: int) -> Tensor:
    """Select heads of x along a dimension; a view if they are contiguous."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return x.narrow(dim, heads[0], len(heads))
    return x.index_select(dim, torch.tensor(heads, device=x.device))


def _attend_group(call: AttentionCall, group: HeadGroup) -> Output:
    """Compute the attention of heads that share one window."""
    kv_len = call.k.shape[2]
    window = None if group.window is None or group.window >= kv_len else group.window
    by_sdpa = window is None and _sdpa_serves(call)
    if by_sdpa and not call.with_stats:
        return Output(_sdpa(call))
    out, lse, max_logit, entropy = tiled_attention(call, window, with_values=not by_sdpa)
    if by_sdpa:
        out = _sdpa(call)
    if call.with_stats:
        return Output(out, lse, max_logit, entropy)
    return Output(out, lse) if call.with_lse else Output(out)


def _sdpa_serves(call: AttentionCall) -> bool:
    """Return whether SDPA's kernel without a mask computes this call for global heads."""
    has_kernel = sdpa_operator.has_kernel(call.q.device, call.score_dtype, call.q.shape[3])
    aligned = call.q.shape[2] == call.k.shape[2] or not call.causal  # SDPA's causal mask is top-left
    plain = call.softcap is None and call.alibi_slopes is None and call.segment_ids is None
    # its CPU kernel scales the -inf of hidden pairs too, which a scale <= 0 turns into NaN or +inf
    plain = plain and call.scale > 0 and not call.round_probabilities and not call.with_lse
    return has_kernel and aligned and plain


def _sdpa(call: AttentionCall) -> Tensor:
    # in the score dtype, since SDPA rounds the probabilities of half inputs; and with the entries of a head
    # contiguous, without which it falls back to n×n scores
    q, k, v = (x.to(call.score_dtype) for x in (call.q, call.k, call.v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if call.q.shape[1] != call.k.shape[1]:
        group_size = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    return sdpa_operator.sdpa(q, k, v, call.causal, call.scale).to(call.out_dtype)

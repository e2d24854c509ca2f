"""The definition of attention over a head layout: plain maths with n×n scores, the oracle of every test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.call import AttentionCall, Output
from longshort.backends.visible_sums import visible_product, visible_scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def supports(call: AttentionCall) -> str | None:
    """Return why the reference cannot serve a call, or None: it serves all but one kind."""
    if call.round_probabilities and operators.forward_mode_is_on():
        return "forward-mode differentiation is on, for which round_probabilities is not defined"
    return None


def attend(call: AttentionCall) -> Output:
    """Compute attention by its definition; memory O(heads · q_len · kv_len)."""
    dtype = call.score_dtype
    group_size = call.layout.group_size
    q = call.q.to(dtype)
    k = call.k.to(dtype).repeat_interleave(group_size, dim=1)
    v = call.v.to(dtype).repeat_interleave(group_size, dim=1)
    visible = visible_pairs(call)
    seen = visible.any(-1, keepdim=True)

    logits = call.scale * visible_scores(q, k, visible)
    if call.round_probabilities:
        logits = _RoundGradient.apply(logits, call.v.dtype)
    scores = logits
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes[:, None, None] * _distance(call)
    scores = scores.masked_fill(~visible, -torch.inf)

    if call.round_probabilities:
        out, lse = _RoundedSoftmax.apply(scores, v, visible, call.v.dtype)
    else:
        weights, row_max, row_sum = _softmax_parts(scores, seen)
        # divided first: the gradient of a one-hot row is then exactly 0
        out = visible_product(weights / row_sum, v, visible)
        lse = (row_max + row_sum.log()).masked_fill(~seen, -torch.inf).squeeze(-1)
    out = out.to(call.out_dtype)
    if not call.with_stats:
        return Output(out, lse)
    with torch.no_grad():
        max_logit = logits.masked_fill(~visible, 0.0).abs().amax(dim=(0, 2, 3))
        entropy = _mean_entropy(scores, seen)
    return Output(out, lse, max_logit, entropy)


def visible_pairs(call: AttentionCall) -> Bool[Tensor, "#batch heads q_len kv_len"]:
    """Mark the visible pairs of each head: the definition that every other backend must meet."""
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    key = torch.arange(kv_len, device=device)
    query = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]

    segments = call.segment_ids
    if segments is None:
        segments = torch.zeros(1, kv_len, dtype=torch.int64, device=device)
    same_segment = segments[:, :, None] == segments[:, None, :]
    rank_in_segment = same_segment.tril(-1).sum(-1)
    is_sink = (rank_in_segment < call.layout.sink_tokens)[:, None, :]
    allowed = same_segment[:, kv_len - q_len :] & (segments >= 0)[:, None, :]
    if call.causal:
        allowed = allowed & (key <= query)

    per_head = {}
    for window in {group.window for group in call.layout.groups}:
        if window is None:
            per_head[window] = allowed
        else:
            per_head[window] = allowed & ((_distance(call) < window) | is_sink)
    return torch.stack([per_head[window] for window in call.layout.windows], dim=1)


def _distance(call: AttentionCall) -> Tensor:
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    key = torch.arange(kv_len, device=call.q.device)
    return (key[kv_len - q_len :, None] - key).abs()


def _softmax_parts(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(z - row maximum), the row maximum and the sum; the last two are 0 and 1 in empty rows."""
    row_max = scores.detach().amax(-1, keepdim=True).masked_fill(~seen, 0.0)
    weights = torch.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdim=True).masked_fill(~seen, 1.0)
    return weights, row_max, row_sum


def _mean_entropy(scores: Tensor, seen: Tensor) -> Float[Tensor, " heads"]:
    """Compute log l - Σ e·(z - m)/l: no cancellation at large logits, unlike lse - Σ p·z."""
    weights, row_max, row_sum = _softmax_parts(scores, seen)
    weighted = torch.where(weights == 0, 0.0, weights * (scores - row_max)).sum(-1, keepdim=True)
    entropy = (row_sum.log() - weighted / row_sum).masked_fill(~seen, 0.0)
    rows = seen.expand_as(entropy).sum(dim=(0, 2, 3))
    return entropy.sum(dim=(0, 2, 3)) / rows.clamp(min=1)


class _RoundGradient(torch.autograd.Function):
    """Identity whose gradient (dS) is rounded to `dtype`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, dtype: torch.dtype) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.rounding_dtype = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.rounding_dtype).to(grads[0].dtype), None


class _RoundedSoftmax(torch.autograd.Function):
    """softmax(scores) @ v with the roundings of a flash kernel in `dtype`, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, v: Tensor, visible: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        seen = visible.any(-1, keepdim=True)
        weights, row_max, row_sum = _softmax_parts(scores, seen)
        out = visible_product(weights.to(dtype).to(v.dtype), v, visible) / row_sum
        lse = (row_max + row_sum.log()).masked_fill(~seen, -torch.inf).squeeze(-1)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, torch.dtype], output: Any) -> None:
        scores, v, visible, ctx.rounding_dtype = inputs
        ctx.save_for_backward(scores, v, visible, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor | None, None, None]:
        scores, v, visible, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        probabilities = torch.exp(scores - lse[..., None]).masked_fill(~visible, 0.0)
        grad_scores, grad_v = torch.zeros_like(scores), None
        if grad_out is not None:
            rounded = probabilities.to(ctx.rounding_dtype).to(v.dtype)
            grad_v = visible_product(rounded.mT, grad_out, visible.mT)
            rounded_out = out.to(ctx.rounding_dtype).to(v.dtype)
            row_dot = (grad_out * rounded_out).sum(-1, keepdim=True)
            grad_scores = probabilities * (visible_scores(grad_out, v, visible) - row_dot)
        if grad_lse is not None:
            grad_scores = grad_scores + probabilities * grad_lse[..., None]
        return grad_scores, grad_v, None, None

"""The operator behind `blockwise`: softmax attention of heads with one window, a tile of scores at a time.

A tile is a run of query blocks with the keys that each block can see. Its forward pass is the textbook one;
its backward pass recomputes the scores and takes the probabilities from the saved row maximum and log of the
row sum. These are kept apart, since their sum would round away what matters when logits are large. The
operator is registered with torch.library, so that compilers see one opaque call instead of an unrolled loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.call import AttentionCall
from longshort.backends.tiles import ALL_BUT_HEADS, Problem, Tile, accumulation_dtype
from longshort.backends.visible_sums import add_terms, is_finite, nonfinite_terms, zero_nonfinite


def tiled_attention(
    call: AttentionCall, window: int | None, with_values: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the attention of all heads of the call, each with this window, whatever the call's layout says.

    Args:
        call: its layout is read for `sink_tokens` only.
        window: keys that a query sees, itself included; None is global.
        with_values: if False, `out` is left empty and only lse and statistics are computed.

    Returns:
        out (batch, heads, q_len, head_dim) in `call.out_dtype`; lse (batch, heads, q_len), differentiable;
        max_logit and entropy (heads,), empty unless the call asks for statistics.
    """
    out, row_max, log_sum, max_logit, entropy = operators.call(
        "tiled_attention",
        call.q, call.k, call.v if with_values else None, call.alibi_slopes, call.segment_ids, window,
        call.layout.sink_tokens, call.causal, call.scale, call.softcap, call.round_probabilities,
        call.out_dtype, call.with_stats,
    )  # fmt: skip
    return out, row_max.detach() + log_sum, max_logit.detach(), entropy.detach()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    window: int | None,
    sink_tokens: int,
    causal: bool,
    scale: float,
    softcap: float | None,
    round_probabilities: bool,
    out_dtype: torch.dtype,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, row maximum of the scores, log of the sum of exp(score - row maximum), max_logit, entropy.

    The gradient of log_sum is that of lse, since the row maximum counts as a constant.
    """
    problem = Problem(q, k, alibi_slopes, segment_ids, window, sink_tokens, causal, scale, softcap)
    options = (problem, v, round_probabilities, out_dtype, with_stats)
    outputs = _attend(*options, times_keys=Tile.times_keys)
    if is_finite(outputs[0]):
        return outputs
    return _attend(*options, times_keys=_times_visible_keys)


def _attend(
    problem: Problem,
    v: Tensor | None,
    round_probabilities: bool,
    out_dtype: torch.dtype,
    with_stats: bool,
    times_keys: Callable[[Tile, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k = problem.q, problem.k
    out, row_maxima, log_sums, max_logit, entropy = _empty_outputs(q, v is not None, out_dtype, with_stats)
    for part in problem.parts():
        q_part = part.queries(q)
        k_part = part.keys(k)
        v_part = None if v is None else part.keys(v)
        for tile in part.tiles():
            q_rows = tile.rows_of(q_part) * problem.scale
            logits = tile.logits(q_rows, k_part)
            lowest = highest = None
            if with_stats:
                lowest = tile.lowest_visible(logits)
                if problem.softcap is not None or problem.alibi_slopes is not None:
                    highest = -tile.lowest_visible(-logits)
            scores = tile.hide(tile.bias(tile.cap(logits)))
            row_max = tile.where_seen(scores.amax(-1, keepdim=True), 0.0)
            if lowest is not None:
                largest = torch.maximum(row_max if highest is None else highest, -lowest)
                largest_so_far = part.heads_of(max_logit)
                largest_so_far.copy_(torch.maximum(largest_so_far, largest.amax(ALL_BUT_HEADS)))
            scores = scores.sub_(row_max)
            weights = tile.exp(scores, in_place=not with_stats)
            row_sum = tile.where_seen(weights.sum(-1, keepdim=True), 1.0)
            if with_stats:
                # no cancellation at large logits, unlike lse - Σ p·z
                weighted = scores.mul_(weights).sum(-1, keepdim=True)
                rows = tile.where_seen(row_sum.log() - weighted / row_sum, 0.0)
                part.heads_of(entropy).add_(rows.sum(ALL_BUT_HEADS))
            log_sum = tile.where_seen(row_sum.log(), -torch.inf)
            tile.write_rows(part.queries(row_maxima.unsqueeze(-1), convert=False), row_max)
            tile.write_rows(part.queries(log_sums.unsqueeze(-1), convert=False), log_sum)
            if v_part is not None:
                if round_probabilities:
                    weights = weights.to(q.dtype).to(weights.dtype)
                rows = times_keys(tile, weights, v_part) / row_sum
                tile.write_rows(part.queries(out, convert=False), rows)
    if with_stats:
        entropy /= problem.rows_that_see()
    return out, row_maxima, log_sums, max_logit, entropy


def _fake_forward(q, k, v, alibi_slopes, segment_ids, window, sink_tokens, causal, scale, softcap,
                  round_probabilities, out_dtype, with_stats):  # fmt: skip
    return _empty_outputs(q, v is not None, out_dtype, with_stats)


def _empty_outputs(
    q: Tensor, with_values: bool, out_dtype: torch.dtype, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(q)
    out = q.new_empty(tuple(q.shape) if with_values else (0,), dtype=out_dtype)
    row_maxima, log_sums = (q.new_empty(tuple(q.shape[:3]), dtype=dtype) for _ in range(2))
    heads = q.shape[1] if with_stats else 0
    max_logit, entropy = (q.new_zeros(heads, dtype=dtype) for _ in range(2))
    return out, row_maxima, log_sums, max_logit, entropy


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor | None,
    row_maxima: Tensor,
    log_sums: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    window: int | None,
    sink_tokens: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `out` is given iff probabilities are rounded."""
    problem = Problem(q, k, alibi_slopes, segment_ids, window, sink_tokens, causal, scale, softcap)
    tensors = (problem, v, out, row_maxima, log_sums, grad_out, grad_lse)
    gradients = _differentiate(*tensors, over_visible=False)
    return gradients if is_finite(*gradients) else _differentiate(*tensors, over_visible=True)


def _differentiate(
    problem: Problem,
    v: Tensor | None,
    out: Tensor | None,
    row_maxima: Tensor,
    log_sums: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    over_visible: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients; `over_visible` is for NaN or inf, which hidden pairs must not pass on."""
    q, k, softcap = problem.q, problem.k, problem.softcap
    times_keys = _times_visible_keys if over_visible else Tile.times_keys
    add_to_keys = _add_to_visible_keys if over_visible else Tile.add_to_keys
    grad_q, grad_k, grad_v = _empty_gradients(q, k, v)
    for part in problem.parts():
        # converted once for all tiles
        q_part, k_part = part.queries(q), part.keys(k)
        v_part = None if v is None else part.keys(v)
        # compilers pass a gradient of the empty output, too
        grad_out_part = None if v is None or grad_out is None else part.queries(grad_out)
        out_part = None if out is None else part.queries(out.to(q.dtype))
        grad_k_part = torch.zeros_like(k_part)
        grad_v_part = torch.zeros_like(k_part)
        for tile in part.tiles():
            q_rows = tile.rows_of(q_part) * problem.scale
            scores = tile.cap(tile.logits(q_rows, k_part))
            cap_slope = None if softcap is None else 1 - (scores / softcap).square_()
            scores = tile.hide(tile.bias(scores))
            row_max, log_sum = (
                tile.split_rows(tile.rows_of(part.queries(x.unsqueeze(-1)))) for x in (row_maxima, log_sums)
            )
            scores = scores.sub_(row_max).sub_(tile.where_seen(log_sum, 0.0))
            probabilities = tile.exp(scores, in_place=True)
            grad_row = None  # gradient of the row's lse
            if grad_lse is not None:
                grad_row = tile.split_rows(tile.rows_of(part.queries(grad_lse.unsqueeze(-1))))
                grad_row = tile.where_seen(grad_row, 0.0)  # else a NaN would spread by 0·NaN
            if v_part is None or grad_out_part is None:
                assert grad_row is not None
                grad_scores = probabilities.mul_(grad_row)
            else:
                grad_rows = tile.rows_of(grad_out_part)
                grad_weights = tile.logits(grad_rows, v_part)
                if over_visible:
                    tile.clear_hidden(grad_weights)
                if out_part is None:
                    row_dot = (grad_weights * probabilities).sum(-1, keepdim=True)
                else:
                    out_rows = tile.rows_of(out_part)
                    row_dot = tile.split_rows((grad_rows * out_rows).sum(-1, keepdim=True))
                if grad_row is not None:
                    row_dot = row_dot - grad_row
                grad_scores = grad_weights.sub_(row_dot).mul_(probabilities)
                if out is not None:
                    probabilities = probabilities.to(q.dtype).to(probabilities.dtype)
                add_to_keys(tile, grad_v_part, probabilities, grad_rows)
            if cap_slope is not None:
                grad_scores = grad_scores.mul_(cap_slope)
            if out is not None:
                grad_scores = grad_scores.to(q.dtype).to(grad_scores.dtype)
            if over_visible:
                tile.clear_hidden(grad_scores)
            rows = times_keys(tile, grad_scores, k_part) * problem.scale
            tile.write_rows(part.queries(grad_q, convert=False), rows)
            add_to_keys(tile, grad_k_part, grad_scores, q_rows)
        part.keys(grad_k, convert=False).copy_(grad_k_part)
        if v is not None:
            part.keys(grad_v, convert=False).copy_(grad_v_part)
    return grad_q, grad_k, grad_v


def _times_visible_keys(tile: Tile, weights: Tensor, keys: Tensor) -> Tensor:
    """Compute `Tile.times_keys` over visible pairs alone; the weights are 0 on hidden ones."""
    out = tile.times_keys(weights, keys)
    if is_finite(out):
        return out
    terms = nonfinite_terms(tile.times_keys, weights, keys, _visible_like(weights, tile))
    return add_terms(tile.times_keys(weights, zero_nonfinite(keys)), terms)


def _add_to_visible_keys(tile: Tile, keys: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Apply `Tile.add_to_keys` over visible pairs alone; the weights are 0 on hidden ones."""
    if is_finite(rows):
        tile.add_to_keys(keys, weights, rows)
        return

    def multiply(weights: Tensor, rows: Tensor) -> Tensor:
        total = torch.zeros_like(keys)
        tile.add_to_keys(total, weights, rows)
        return total

    terms = nonfinite_terms(multiply, weights, rows, _visible_like(weights, tile))
    tile.add_to_keys(keys, weights, zero_nonfinite(rows))
    keys.copy_(add_terms(keys, terms))


def _visible_like(weights: Tensor, tile: Tile) -> Tensor:
    return tile.clear_hidden(torch.ones_like(weights, dtype=torch.bool))


def _fake_backward(q, k, v, alibi_slopes, segment_ids, out, row_maxima, log_sums, grad_out, grad_lse, window,
                   sink_tokens, causal, scale, softcap):  # fmt: skip
    return _empty_gradients(q, k, v)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(tuple(q.shape)),
        k.new_empty(tuple(k.shape)),
        k.new_empty(tuple(k.shape) if v is not None else (0,)),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, alibi_slopes, segment_ids, *options, round_probabilities, _out_dtype, _with_stats = inputs
    out, row_maxima, log_sums, _, _ = output
    if not round_probabilities:
        out = None
    ctx.save_for_backward(q, k, v, alibi_slopes, segment_ids, out, row_maxima, log_sums)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, grad_row_maxima, grad_lse, grad_max_logit, grad_entropy):
    if grad_out is None and grad_lse is None:
        return (None,) * 13
    saved = ctx.saved_tensors  # once: under activation checkpointing a second access is an error
    grad_q, grad_k, grad_v = operators.call(
        "tiled_attention_backward", *saved, grad_out, grad_lse, *ctx.options
    )
    has_values = saved[2] is not None
    return grad_q, grad_k, grad_v if has_values else None, *(None,) * 10


operators.register(
    "tiled_attention",
    "CompositeExplicitAutograd",
    forward=_forward,
    fake_forward=_fake_forward,
    save_for_backward=_save_for_backward,
    gradients=_gradients,
    backward=_backward,
    fake_backward=_fake_backward,
)

"""The operator behind the backend `triton`: launches the kernels, forward and backward.

Each kernel of attention is launched twice. The second launch reads a sum, on the device: if it is finite, as
it almost always is, the launch returns at once; else it computes all again, such that NaN and inf do not
reach rows that hide them.
"""

from __future__ import annotations

from collections.abc import Sequence  # torch reads the annotations of operators

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.triton import backward, forward
from longshort.backends.triton.launching import (
    launch,
    padded,
    precision,
    table_of,
    tiles_for,
    with_near_channels,
    with_positive_scale,
)
from longshort.backends.triton.segments import Segments, find_segments


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    windows: Sequence[int],
    sink_tokens: int,
    causal: bool,
    scale: float,
    softcap: float | None,
    out_dtype: torch.dtype,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, row maximum of the scores, log of the sum of exp(score - row maximum), max_logit, entropy.

    `windows` has one entry per query head.
    """
    q, scale = with_positive_scale(q, scale)
    q, k, v = with_near_channels(q, k, v)
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    tiles = tiles_for("forward", q)
    blocks = -(-q_len // tiles.rows)
    out = q.new_empty(q.shape, dtype=out_dtype)
    row_max, log_sum = (q.new_empty((batch, heads, q_len), dtype=torch.float32) for _ in range(2))
    partials = q.new_empty((2, heads if with_stats else 0, batch * blocks), dtype=torch.float32)
    call = _Call(q, k, alibi_slopes, segment_ids, windows, sink_tokens)
    total = _total(v)
    for careful in (False, True):
        launch(
            forward.forward_kernel, (blocks * batch * heads,), tiles,
            q, k, v, out, row_max, log_sum, partials[0], partials[1], total,
            call.order, call.windows, call.slopes, *call.segments_of_rows(),
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *call.strides(),
            q_len, kv_len, call.sinks, scale, softcap or 0.0, batch, heads, blocks,
            D=head_dim, BLOCK_D=padded(head_dim), ROWS=tiles.rows, KEYS=tiles.keys,
            GROUP=heads // k.shape[1], CAUSAL=causal, SOFTCAP=softcap is not None,
            ALIBI=alibi_slopes is not None, SEGMENTS=segment_ids is not None, SINKS=call.sinks > 0,
            STATS=with_stats, CAREFUL=careful, PRECISION=precision(q),
        )  # fmt: skip
    if not with_stats:
        return out, row_max, log_sum, partials.new_empty(0), partials.new_empty(0)
    rows = (
        q_len * batch if segment_ids is None else (segment_ids[:, kv_len - q_len :] >= 0).sum().clamp(min=1)
    )
    return out, row_max, log_sum, partials[0].amax(1), partials[1].sum(1) / rows


def _fake_forward(q, k, v, alibi_slopes, segment_ids, windows, sink_tokens, causal, scale, softcap, out_dtype,
                  with_stats):  # fmt: skip
    rows = [q.new_empty(tuple(q.shape[:3]), dtype=torch.float32) for _ in range(2)]
    stats = [q.new_empty(q.shape[1] if with_stats else 0, dtype=torch.float32) for _ in range(2)]
    return q.new_empty(tuple(q.shape), dtype=out_dtype), *rows, *stats


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    windows: Sequence[int],
    sink_tokens: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    is_negative = scale < 0
    q, scale = with_positive_scale(q, scale)
    q, k, v = with_near_channels(q, k, v)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    grad_v = v.new_empty(v.shape) if grad_out is not None else v.new_zeros(v.shape)
    has_out = grad_out is not None
    # rounded once for all products, so that they and delta see the same numbers
    (grad_out,) = with_near_channels(out if grad_out is None else grad_out.to(q.dtype))
    call = _Call(q, k, alibi_slopes, segment_ids, windows, sink_tokens)
    constants = {
        "D": head_dim, "BLOCK_D": padded(head_dim), "GROUP": heads // kv_heads, "CAUSAL": causal,
        "SOFTCAP": softcap is not None, "ALIBI": alibi_slopes is not None,
        "SEGMENTS": segment_ids is not None, "HAS_OUT": has_out, "PRECISION": precision(q),
    }  # fmt: skip
    sizes = (q_len, kv_len, call.sinks, scale, softcap or 0.0, batch, heads)

    delta = torch.empty_like(row_max)
    of_lse = row_max if grad_lse is None else grad_lse  # unused if it is None
    tiles = tiles_for("delta", q)
    launch(
        backward.delta_kernel, (batch * heads, -(-q_len // tiles.rows)), tiles,
        out, grad_out, of_lse, delta, *out.stride(), *grad_out.stride(), *of_lse.stride(), q_len, heads,
        D=head_dim, BLOCK_D=padded(head_dim), ROWS=tiles.rows, HAS_OUT=has_out, HAS_LSE=grad_lse is not None,
    )  # fmt: skip

    tiles = tiles_for("grad_q", q)
    blocks = -(-q_len // tiles.rows)
    total = _total(k)
    for careful in (False, True):
        launch(
            backward.grad_q_kernel, (blocks * batch * heads,), tiles,
            q, k, v, grad_out, grad_q, row_max, log_sum, delta, total,
            call.order, call.windows, call.slopes, *call.segments_of_rows(),
            *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *grad_q.stride(), *call.strides(),
            *sizes, blocks, ROWS=tiles.rows, KEYS=tiles.keys, SINKS=call.sinks > 0, CAREFUL=careful,
            **constants,
        )  # fmt: skip

    tiles = tiles_for("grad_kv", q)
    of_sinks = q.new_empty((2, batch, kv_heads, call.sinks, head_dim), dtype=torch.float32)
    total = _total(q) + _total(grad_out) if has_out else _total(q)
    for careful in (False, True):
        for of_sink_blocks in (True, False) if call.sinks else (False,):
            blocks = -(-(call.sinks if of_sink_blocks else kv_len) // tiles.keys)
            launch(
                backward.grad_kv_kernel, (blocks * batch * kv_heads,), tiles,
                q, k, v, grad_out, grad_k, grad_v, of_sinks[0], of_sinks[1], row_max, log_sum, delta, total,
                call.kv_order, call.windows, call.slopes, *call.segments_of_keys(),
                *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *call.strides_of_keys(),
                *sizes, blocks, ROWS=tiles.rows, KEYS=tiles.keys, HAS_SINKS=call.sinks > 0,
                SINKS=of_sink_blocks, CAREFUL=careful, **constants,
            )  # fmt: skip
    return -grad_q if is_negative else grad_q, grad_k, grad_v


def _fake_backward(q, k, v, alibi_slopes, segment_ids, out, row_max, log_sum, grad_out, grad_lse, windows,
                   sink_tokens, causal, scale, softcap):  # fmt: skip
    return tuple(x.new_empty(tuple(x.shape)) for x in (q, k, v))


class _Call:
    """What all kernels of a call read beside q, k and v, on the device."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        alibi_slopes: Tensor | None,
        segment_ids: Tensor | None,
        windows: Sequence[int],
        sink_tokens: int,
    ) -> None:
        self._unused = q.new_empty(1, dtype=torch.int32)
        group = q.shape[1] // k.shape[1]
        longest_first = sorted(range(len(windows)), key=lambda head: -windows[head])
        first_of_groups = [head for head in longest_first if head % group == 0]
        table = table_of((*windows, *longest_first, *first_of_groups), q.device)
        heads = q.shape[1]
        self.windows, self.order, self.kv_order = table[:heads], table[heads : 2 * heads], table[2 * heads :]
        self.slopes = self._unused if alibi_slopes is None else alibi_slopes.contiguous()
        self._segments: Segments = find_segments(segment_ids, q.shape[0], k.shape[2], sink_tokens, q.device)
        positions = self._segments.sink_positions
        self.sinks = 0 if positions is None else positions.shape[1]

    def _or_unused(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(self._unused if x is None else x for x in tensors)

    def segments_of_rows(self) -> tuple[Tensor, ...]:
        found = self._segments
        return self._or_unused(
            found.ids, found.first, found.last, found.sinks_begin, found.sinks_end, found.sink_positions
        )

    def segments_of_keys(self) -> tuple[Tensor, ...]:
        found = self._segments
        return self._or_unused(found.ids, found.first, found.last, found.slots, found.sink_positions)

    def strides(self) -> tuple[int, int]:
        """Strides of the batch in ids and the like, and in the positions of sinks."""
        ids, positions = self._or_unused(self._segments.ids, self._segments.sink_positions)
        return ids.stride(0), positions.stride(0)

    def strides_of_keys(self) -> tuple[int, int, int]:
        (slots,) = self._or_unused(self._segments.slots)
        return self.strides()[0], slots.stride(0), self.strides()[1]


def _total(x: Tensor) -> Tensor:
    """The sum of all entries: not finite if one is not. A sum that overflows costs time, and nothing else."""
    return x.sum(dtype=torch.float32)


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, alibi_slopes, segment_ids, *options, _out_dtype, _with_stats = inputs
    out, row_max, log_sum, _, _ = output
    ctx.save_for_backward(q, k, v, alibi_slopes, segment_ids, out, row_max, log_sum)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, grad_row_max, grad_lse, grad_max_logit, grad_entropy):
    if grad_out is None and grad_lse is None:
        return (None,) * 12
    # read once: under activation checkpointing a second access is an error
    gradients = operators.call(
        "triton_attention_backward", *ctx.saved_tensors, grad_out, grad_lse, *ctx.options
    )
    return *gradients, *(None,) * 9


operators.register(
    "triton_attention",
    "CompositeExplicitAutograd",
    forward=_forward,
    fake_forward=_fake_forward,
    save_for_backward=_save_for_backward,
    gradients=_gradients,
    backward=_backward,
    fake_backward=_fake_backward,
)

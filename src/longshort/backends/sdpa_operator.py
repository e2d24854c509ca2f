"""The operator behind global heads of `blockwise` that need no option: PyTorch's fused kernels for SDPA.

These kernels carry 0·NaN from hidden keys and rows into every result. So results are checked, and where there
is a NaN or inf, the kernel computes again with zeros instead, and `tiled_operator` computes the rows that the
NaN or inf reaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.visible_sums import is_finite, zero_nonfinite

_aten = torch.ops.aten
# If all scores of a row are NaN and fit into one vector of the CPU, its kernel treats them as hidden.
_FEW_KEYS = 32


def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether PyTorch has a kernel without n×n scores for tensors of this kind."""
    if device.type == "cuda":
        return dtype == torch.float32 and head_dim % 4 == 0
    return device.type in ("cpu", "meta")


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Compute the attention of global heads.

    Args:
        q, k, v: (batch, heads, sequence, head_dim) in fp32 or fp64, such that `has_kernel` is true; the last
            dimension is contiguous. As many queries as keys if causal.
        causal: queries see no later key.
        scale: > 0, since the CPU's kernel scales the -inf of hidden pairs too.
    """
    return operators.call("sdpa", q, k, v, causal, scale)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out, and what the kernel's backward pass needs beside it."""
    outputs = _fused(q, k, v, causal, scale)
    looked_at = (outputs[0], q, k) if k.shape[2] < _FEW_KEYS else outputs[:1]
    if not is_finite(*looked_at):
        outputs = _fused(zero_nonfinite(q), zero_nonfinite(k), zero_nonfinite(v), causal, scale)
        rows = _rows_reached(q, k, v, causal)
        outputs[0].copy_(torch.where(rows, _tiled(q, k, v, causal, scale)[0], outputs[0]))
    return outputs


def _fused(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if q.is_cuda:
        return _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, is_causal=causal, scale=scale
        )
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)
    return out, lse, q.new_empty(0), q.new_empty(0)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    grad_out: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    gradients = _fused_backward(q, k, v, out, lse, seed, offset, grad_out, causal, scale)
    if is_finite(*gradients):
        return gradients
    rows = _rows_reached(q, k, v, causal) | ~(out.isfinite() & grad_out.isfinite()).all(-1, keepdim=True)
    keys = rows.flip(2).cumsum(2).flip(2) > 0 if causal else rows.any(2, keepdim=True)
    clean_q, clean_k, clean_v, clean_grad = (zero_nonfinite(x) for x in (q, k, v, grad_out))
    outputs = _fused(clean_q, clean_k, clean_v, causal, scale)
    if not is_finite(outputs[0]):  # scores that overflow
        clean_q = clean_q.masked_fill(rows, 0.0)
        outputs = _fused(clean_q, clean_k, clean_v, causal, scale)
    gradients = _fused_backward(clean_q, clean_k, clean_v, *outputs, clean_grad, causal, scale)
    _, row_maxima, log_sums, _, _ = _tiled(q, k, v, causal, scale)
    in_tiles = torch.ops.longshort.tiled_attention_backward(
        q, k, v, None, None, None, row_maxima, log_sums, grad_out, None, None, 0, causal, scale, None
    )
    for gradient, other, reached in zip(gradients, in_tiles, (rows, keys, keys), strict=True):
        gradient.copy_(torch.where(reached, other, gradient))
    return gradients


def _fused_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    grad_out: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        return _aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False], causal,
            scale=scale,
        )[:3]  # fmt: skip
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _rows_reached(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Mark the rows that a NaN or inf in q, k or v may change: (batch, heads, sequence, 1)."""
    in_keys = ~(k.isfinite() & v.isfinite()).all(-1, keepdim=True)
    seen = in_keys.cumsum(2) > 0 if causal else in_keys.any(2, keepdim=True)
    return seen | ~q.isfinite().all(-1, keepdim=True)


def _tiled(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    return torch.ops.longshort.tiled_attention(
        q, k, v, None, None, None, 0, causal, scale, None, False, q.dtype, False
    )


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, *others):
    if grad_out is None:
        return (None,) * 5
    # read once: under activation checkpointing a second access is an error
    gradients = operators.call("sdpa_backward", *ctx.saved_tensors, grad_out, *ctx.options)
    return *gradients, None, None


operators.register(
    "sdpa",
    "CompositeExplicitAutograd",
    forward=_forward,
    fake_forward=_fused,
    save_for_backward=_save_for_backward,
    gradients=_gradients,
    backward=_backward,
    fake_backward=_fused_backward,
)

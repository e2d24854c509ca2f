"""Attention on the CPU with the C++ kernels of csrc/: all heads in one call, O(n·w) for local heads.

Scores, sums and statistics are fp32; bfloat16 inputs are converted on the fly. Tensors are read in place,
whatever their strides, and no n×n or n×w array exists: each thread holds a few blocks of O(head_dim · block)
numbers; the backward pass adds two numbers per row and, for bfloat16, the gradient of q in fp32. Results do
not depend on the number of threads, bit for bit.

The kernels are registered with torch.library, so that compilers see one opaque call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence  # torch reads the annotations of operators
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.call import AttentionCall, Output, output_from
from longshort.layout import HeadLayout

_kernels: Any = None
_MISSING: str | None = None
try:
    _kernels = import_module("longshort.backends._kernels")
except ModuleNotFoundError:
    _MISSING = "the C++ kernels are not built"
except ImportError as error:
    if os.environ.get("LONGSHORT_CPU"):  # asked for by name: there is no substitute
        raise
    _MISSING = f"the C++ kernels cannot be loaded: {error}"
else:
    _LIBTORCH = f"{torch.__path__[0]}/lib/libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"
    if not _kernels.find_torch_threads(_LIBTORCH):
        _kernels = None
        _MISSING = f"the C++ kernels find no torch_parallel_for in {_LIBTORCH}"

_LARGEST_HEAD_DIM = 256
_LONGEST = 2**30  # positions are 32-bit numbers
# Calls with no more queries than this are split over keys, not queries.
_DECODING_QUERIES = 8
_SMALLEST = torch.finfo(torch.float32).tiny
_GLOBAL = -1  # as a window


def supports(call: AttentionCall) -> str | None:
    """Return why these kernels cannot serve a call, or None."""
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device.type}, not on the CPU"
    if call.q.dtype not in (torch.float32, torch.bfloat16):
        return f"q is {call.q.dtype}; the kernels compute float32 and bfloat16"
    if call.q.shape[3] > _LARGEST_HEAD_DIM:
        return f"head_dim is {call.q.shape[3]}; the kernels take at most {_LARGEST_HEAD_DIM}"
    if call.k.shape[2] >= _LONGEST:
        return f"there are {call.k.shape[2]} keys; the kernels take fewer than {_LONGEST}"
    if call.round_probabilities:
        return "the kernels do not round probabilities"
    if operators.forward_mode_is_on():
        return operators.NO_TANGENTS
    return _MISSING


def missing() -> str | None:
    """Return why there are no kernels on this machine, or None if there are."""
    return _MISSING


def instruction_set() -> str | None:
    """Return the build of the kernels in use: v4 (AVX-512), v3 (AVX2), v1 (SSE2) or native, or None.

    This is the fastest that this processor can run, or the one that LONGSHORT_CPU in the environment names;
    None if the kernels are not built.
    """
    return None if _kernels is None else _kernels.instruction_set


def instruction_sets() -> list[str]:
    """Return the builds that this processor can run, fastest first; empty if the kernels are not built."""
    return [] if _kernels is None else _kernels.instruction_sets


def fma_peak() -> float | None:
    """Measure the FLOP/s of one thread that does nothing but multiply-adds, in about 20 ms, with the vectors
    of `instruction_set`; None if the kernels are not built."""
    return None if _kernels is None else _kernels.fma_peak()


def attend(call: AttentionCall) -> Output:
    """Compute the attention of all heads in one call."""
    differentiable = torch.is_grad_enabled() and (
        any(x.requires_grad for x in (call.q, call.k, call.v)) or operators.transforms_are_active()
    )
    found = operators.call(
        "cpu_attention", call.q, call.k, call.v, call.alibi_slopes, call.segment_ids,
        windows_of_kv_heads(call.layout),
        min(call.layout.sink_tokens, _LONGEST),
        call.causal, call.scale, call.softcap, call.out_dtype, call.with_stats, differentiable,
    )  # fmt: skip
    return output_from(call, *found)


def windows_of_kv_heads(layout: HeadLayout) -> list[int]:
    """Return the window of each key/value head as the kernels expect it."""
    return [
        _GLOBAL if window is None else min(window, _LONGEST)
        for window in layout.windows[:: layout.group_size]
    ]


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
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, row maximum of the scores, log of the sum of exp(score - row maximum), max_logit, entropy.

    `windows` has one entry per key/value head. `differentiable` keeps calls with few queries on the path
    whose scores the backward pass repeats bit for bit, which matters when logits are large.
    """
    out, row_max, log_sum, max_logit, entropy = _empty_outputs(q, out_dtype, with_stats)
    decode = not differentiable and q.shape[2] <= _DECODING_QUERIES
    problem, _alive = _problem(
        q, k, v, k.shape[2], windows, sink_tokens, causal, scale, softcap, alibi_slopes, segment_ids
    )
    _kernels.forward(
        problem, _described(out), _address(row_max), _address(log_sum),
        _address(max_logit if with_stats else None), _address(entropy if with_stats else None), decode,
    )  # fmt: skip
    return out, row_max, log_sum, max_logit, entropy


def _fake_forward(q, k, v, alibi_slopes, segment_ids, windows, sink_tokens, causal, scale, softcap, out_dtype,
                  with_stats, differentiable):  # fmt: skip
    return _empty_outputs(q, out_dtype, with_stats)


def _empty_outputs(
    q: Tensor, out_dtype: torch.dtype, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(q, dtype=out_dtype)  # the memory layout of q, which suits the next projection
    row_max, log_sum = (q.new_empty(tuple(q.shape[:3]), dtype=torch.float32) for _ in range(2))
    heads = q.shape[1] if with_stats else 0
    max_logit, entropy = (q.new_empty(heads, dtype=torch.float32) for _ in range(2))
    return out, row_max, log_sum, max_logit, entropy


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
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    grad_q = torch.zeros_like(q, dtype=torch.float32)  # tasks add to it
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype).expand_as(out)
    grad_lse = _contiguous(grad_lse)
    problem, _alive = _problem(
        q, k, v, k.shape[2], windows, sink_tokens, causal, scale, softcap, alibi_slopes, segment_ids
    )
    _kernels.backward(
        problem, _described(out), _address(row_max), _address(log_sum), _described(grad_out),
        _address(grad_lse), _described(grad_q), _described(grad_k), _described(grad_v),
    )  # fmt: skip
    return grad_q.to(q.dtype), grad_k, grad_v


def _fake_backward(q, k, v, alibi_slopes, segment_ids, out, row_max, log_sum, grad_out, grad_lse, windows,
                   sink_tokens, causal, scale, softcap):  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def supports_cached(q: Tensor, length: int) -> bool:
    """Return whether `attend_cached` can serve queries like q over `length` tokens, the new ones included."""
    return (
        _MISSING is None
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.shape[3] <= _LARGEST_HEAD_DIM
        and q.shape[2] <= _DECODING_QUERIES
        and length < _LONGEST
    )


def describe_store(store: Tensor, sinks: Tensor, sink_positions: Tensor, ring: int) -> tuple[int, ...]:
    """Describe the keys and values of a group of heads in a cache to `attend_cached`; valid while the tensors
    live.

    Args:
        store: (2, batch, kv_heads, slots, head_dim), keys and values, contiguous. Position p is in slot
            p % ring.
        sinks: (2, batch, kv_heads, n, head_dim), the sinks that have left the ring, contiguous.
        sink_positions: (batch, n) of int64: the positions of the sinks, -1 for none.
        ring: size of the ring, 0 for a store that keeps everything.
    """
    at, sink_at, size = store.data_ptr(), sinks.data_ptr(), store.element_size()
    v, sink_v = at + store.stride(0) * size, sink_at + sinks.stride(0) * size
    return at, v, store.shape[3], ring, sink_at, sink_v, sinks.shape[3], sink_positions.data_ptr()


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stores: Sequence[tuple[int, ...]],
    firsts: Sequence[int],
    group_of: Sequence[int],
    windows: Sequence[int],
    sink_tokens: int,
    length: int,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Append new keys and values to those of a cache and attend to them all, causally. The caller has
    checked everything; there are no gradients. For compilers, torch.ops.longshort.cpu_attend_cached does the
    same; without one, its dispatch would cost more than everything else.

    Args:
        q, k, v: of the new tokens; k and v in the dtype of the stores.
        stores: for each group of heads that share a window, the result of `describe_store`, with free slots
            for the new tokens.
        firsts: for each group, the first position that is still in its store after the append.
        group_of: the group of each key/value head.
        windows: the result of `windows_of_kv_heads`.
        sink_tokens: number of first keys of a segment that are sinks.
        length: positions before the new ones.
        scale, softcap, alibi_slopes, segment_ids: as in `AttentionCall`; the slopes in fp32.
        with_lse: return the lse too.

    Returns:
        out, and the natural log of the sum of exp(score), or None.
    """
    out = torch.empty_like(q)
    row_max = log_sum = None
    if with_lse:
        row_max, log_sum = q.new_empty((2, *q.shape[:3]), dtype=torch.float32).unbind()
    problem, _alive = _problem(
        q, k, v, length + q.shape[2], windows, sink_tokens, True, scale, softcap, alibi_slopes, segment_ids
    )
    _kernels.attend_cached(
        problem, _described(out), _address(row_max), _address(log_sum), stores, firsts, group_of
    )
    return out, None if row_max is None or log_sum is None else row_max + log_sum


def _attend_cached_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stores: Sequence[Tensor],
    sinks: Sequence[Tensor],
    sink_positions: Sequence[Tensor],
    rings: Sequence[int],
    firsts: Sequence[int],
    group_of: Sequence[int],
    windows: Sequence[int],
    sink_tokens: int,
    length: int,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    described = [describe_store(*store) for store in zip(stores, sinks, sink_positions, rings, strict=True)]
    out, lse = attend_cached(
        q, k, v, described, firsts, group_of, windows, sink_tokens, length, scale, softcap, alibi_slopes,
        segment_ids, with_lse,
    )  # fmt: skip
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _fake_attend_cached(q, k, v, stores, sinks, sink_positions, rings, firsts, group_of, windows, sink_tokens,
                        length, scale, softcap, alibi_slopes, segment_ids, with_lse):  # fmt: skip
    lse = q.new_empty(tuple(q.shape[:3]) if with_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: int,
    windows: Sequence[int],
    sink_tokens: int,
    causal: bool,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[tuple[Any, ...], tuple[Tensor | None, Tensor | None]]:
    """The problem as all kernels take it (`ProblemOf` in csrc/module.cpp), and tensors that must live until
    they return."""
    batch, heads, q_len, head_dim = q.shape
    slopes, ids = _contiguous(alibi_slopes), _contiguous(segment_ids)
    # softcap 0 is none for the kernels, so one that rounds to 0 in fp32 may not
    softcap = 0.0 if softcap is None else max(softcap, _SMALLEST)
    problem = (
        _described(q), _described(k), _described(v), (batch, heads, len(windows), q_len, kv_len, head_dim),
        windows, sink_tokens, causal, scale, softcap, _address(slopes), _address(ids),
    )  # fmt: skip
    return problem, (slopes, ids)


def _described(x: Tensor) -> tuple[int, bool, tuple[int, ...]]:
    return x.data_ptr(), x.dtype == torch.bfloat16, x.stride()


def _contiguous(x: Tensor | None) -> Tensor | None:
    """Make a small tensor contiguous, as the kernels need it; the caller keeps it alive during the call."""
    return None if x is None else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, alibi_slopes, segment_ids, *options, _out_dtype, _with_stats, _differentiable = inputs
    out, row_max, log_sum, _, _ = output
    ctx.save_for_backward(q, k, v, alibi_slopes, segment_ids, out, row_max, log_sum)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, grad_row_max, grad_lse, grad_max_logit, grad_entropy):
    if grad_out is None and grad_lse is None:
        return (None,) * 13
    # read once: under activation checkpointing a second access is an error
    gradients = operators.call("cpu_attention_backward", *ctx.saved_tensors, grad_out, grad_lse, *ctx.options)
    return *gradients, *(None,) * 10


operators.register(
    "cpu_attention",
    "CPU",
    forward=_forward,
    fake_forward=_fake_forward,
    save_for_backward=_save_for_backward,
    gradients=_gradients,
    backward=_backward,
    fake_backward=_fake_backward,
)
operators.define(
    "cpu_attend_cached", "CPU", _attend_cached_operator, _fake_attend_cached, mutates_args=("stores",)
)

"""Attention on GPUs with Triton: all heads in one launch, O(n·w) for local heads, forward and backward.

Windows come from a tensor and bound the loops over keys, so that one kernel serves heads of all windows;
tiles outside the band or of other segments are not visited. Nothing of n×n exists, nothing is read back to
the host, and results are the same bits on each run.

Triton is imported on the first call that can use it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.call import AttentionCall, Output, output_from
from longshort.backends.triton.launching import interpreted
from longshort.layout import HeadLayout

_LARGEST_HEAD_DIM = 256
_GLOBAL = 1 << 30  # as a window; positions are 32-bit numbers
_OLDEST = (8, 0)  # compute capability
_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def supports(call: AttentionCall) -> str | None:
    """Return why these kernels cannot serve a call, or None."""
    refusal = _refusal(call.q, call.k.shape[2])
    if refusal is not None:
        return refusal
    if call.round_probabilities:
        return "the kernels round probabilities in a way of their own"
    return operators.NO_TANGENTS if operators.forward_mode_is_on() else None


def supports_cached(q: Tensor, length: int) -> bool:
    """Return whether the decoding kernels can serve queries like q over `length` tokens, the new one
    included."""
    return _refusal(q, length) is None


def _refusal(q: Tensor, kv_len: int) -> str | None:
    if not (q.is_cuda or interpreted()):
        return f"the tensors are on {q.device.type}, not on a GPU"
    if q.dtype == torch.float64:
        return f"q is {q.dtype}; the kernels compute float32, bfloat16 and float16"
    if q.shape[3] > _LARGEST_HEAD_DIM:
        return f"head_dim is {q.shape[3]}; the kernels take at most {_LARGEST_HEAD_DIM}"
    if kv_len >= _GLOBAL:
        return f"there are {kv_len} keys; the kernels take fewer than {_GLOBAL}"
    return missing(q.device)


def missing(device: torch.device | None = None) -> str | None:
    """Return why the kernels cannot run on a device, or None if they can; without a device, why they can run
    nowhere."""
    if not _IS_INSTALLED:
        return "triton is not installed"
    if device is not None and device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_properties(device)
        if (found.major, found.minor) < _OLDEST:
            return f"the GPU has compute capability {found.major}.{found.minor}; 8.0 is needed"
    return None


def windows_of_kv_heads(layout: HeadLayout) -> list[int]:
    """Return the window of each key/value head as the kernels expect it."""
    return _numbers(layout.windows[:: layout.group_size])


def _numbers(windows: Sequence[int | None]) -> list[int]:
    return [_GLOBAL if w is None else min(w, _GLOBAL) for w in windows]


def attend(call: AttentionCall) -> Output:
    """Compute the attention of all heads in one launch."""
    from longshort.backends.triton import operator as _  # noqa: F401  (registers the operator)

    windows = _numbers(call.layout.windows)
    found = operators.call(
        "triton_attention", call.q, call.k, call.v, call.alibi_slopes, call.segment_ids, windows,
        min(call.layout.sink_tokens, _GLOBAL), call.causal, call.scale, call.softcap, call.out_dtype,
        call.with_stats,
    )  # fmt: skip
    return output_from(call, *found)

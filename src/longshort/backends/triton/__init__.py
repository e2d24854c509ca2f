"""Attention on GPUs with Triton: all heads in one launch, O(n·w) for local heads, forward and backward.

Windows come from a tensor and bound the loops over keys, so that one kernel serves heads of all windows;
tiles outside the band or of other segments are not visited. Nothing of n×n exists, nothing is read back to
the host, and results are the same bits on each run.

Triton is imported on the first call that can use it.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from longshort.backends import operators
from longshort.backends.call import AttentionCall, Output

_LARGEST_HEAD_DIM = 256
_GLOBAL = 1 << 30  # as a window; positions are 32-bit numbers
_OLDEST = (8, 0)  # compute capability


def supports(call: AttentionCall) -> str | None:
    """Return why these kernels cannot serve a call, or None."""
    if call.q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {call.q.device.type}, not on a GPU"
    if call.q.dtype == torch.float64:
        return f"q is {call.q.dtype}; the kernels compute float32, bfloat16 and float16"
    if call.q.shape[3] > _LARGEST_HEAD_DIM:
        return f"head_dim is {call.q.shape[3]}; the kernels take at most {_LARGEST_HEAD_DIM}"
    if call.k.shape[2] >= _GLOBAL:
        return f"there are {call.k.shape[2]} keys; the kernels take fewer than {_GLOBAL}"
    if call.round_probabilities:
        return "the kernels round probabilities in a way of their own"
    if operators.forward_mode_is_on():
        return operators.NO_TANGENTS
    return missing(call.q.device.index if call.q.is_cuda else None)


@cache
def missing(device: int | None = None) -> str | None:
    """Return why the kernels cannot run on a GPU, or None if they can.

    Args:
        device: number of the GPU; None: the interpreter's CPU, or any.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device is not None and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    return None


def attend(call: AttentionCall) -> Output:
    """Compute the attention of all heads in one launch."""
    from longshort.backends.triton import operator as _  # noqa: F401  (registers the operator)

    windows = [_GLOBAL if w is None else min(w, _GLOBAL) for w in call.layout.windows]
    out, row_max, log_sum, max_logit, entropy = operators.call(
        "triton_attention", call.q, call.k, call.v, call.alibi_slopes, call.segment_ids, windows,
        min(call.layout.sink_tokens, _GLOBAL), call.causal, call.scale, call.softcap, call.out_dtype,
        call.with_stats,
    )  # fmt: skip
    if not (call.with_lse or call.with_stats):
        return Output(out)
    # the gradient of log_sum is that of lse, since the row maximum counts as a constant
    lse = row_max.detach() + log_sum
    return Output(out, lse, max_logit.detach(), entropy.detach()) if call.with_stats else Output(out, lse)

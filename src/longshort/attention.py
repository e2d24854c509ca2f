"""`attention()`: checks a call once, picks one backend, and composes what is common to all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from longshort.backends import blockwise, cpu, flex, reference, triton
from longshort.backends.call import AttentionCall, Output
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Fastest first: `auto` takes the first that supports the call.
BACKENDS = {"cpu": cpu, "triton": triton, "blockwise": blockwise, "reference": reference, "flex": flex}
BY_NAME_ONLY = ("flex",)
"""The backends that `auto` does not take."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Asked once, because torch.compile of torch 2.10 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "hpu", "mps", "xpu") if torch.amp.is_autocast_available(name)
)


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of one attention call, in fp32 (fp64 for fp64 inputs).

    Attributes:
        lse: per row the natural log of the sum of exp(score), before the sink logit; differentiable;
            -inf in rows that see nothing.
        max_logit: per head the largest |scale·q·k| over the visible pairs of the whole batch, before softcap
            and ALiBi; 0 where nothing is visible; no gradient.
        entropy: per head the mean entropy in nats over the rows that see something, before the sink logit;
            0 where no row does; no gradient.
    """

    lse: Float[Tensor, "batch heads q_len"]
    max_logit: Float[Tensor, " heads"]
    entropy: Float[Tensor, " heads"]


@dataclass(frozen=True)
class Explanation:
    """The backend that serves a call, and why each other backend does not.

    Attributes:
        backend: name of the backend that is used.
        reasons: why each other backend is not used, by its name.
    """

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        others = [f"{name}: not used, {reason}" for name, reason in self.reasons.items()]
        return "\n".join([f"{self.backend}: used", *others])


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of `attention`, except return_stats and backend."""

    causal: bool
    scale: float | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sink_logits: Tensor | None
    segment_ids: Tensor | None
    round_probabilities: bool


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: HeadLayout,
    *,
    return_stats: Literal[False] = ...,
    backend: str = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: HeadLayout,
    *,
    return_stats: Literal[True],
    backend: str = ...,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionStats]: ...
def attention(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len head_dim"],
    layout: HeadLayout,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Float[Tensor, " heads"] | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
    segment_ids: Int[Tensor, "batch kv_len"] | None = None,
    round_probabilities: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Multi-head attention in which each head has its own window.

    Query i and key j, their positions aligned so that the last query is the last key, see each other iff
    j <= i (causal); i - w < j <= i (causal) or |i - j| < w (not causal) for a head of window w, or j is one
    of the first `layout.sink_tokens` keys of its segment; and their segment ids are equal and not negative.
    Scores are z = scale·q·k, then z <- softcap·tanh(z/softcap), then z <- z - slope·|i - j|, then softmax,
    whose denominator also holds exp(sink_logits[head]).

    Under `torch.autocast`, q, k and v are first cast to its dtype, as SDPA does. A NaN or inf reaches the
    rows that see it and changes no bit of other rows, except with backend="flex".

    Args:
        q: queries; float64, float32, bfloat16 or float16, any strides; q_len <= kv_len. Scores and sums are
            computed in fp32 (fp64 for fp64).
        k: keys, of the dtype of q.
        v: values, of the dtype of q.
        layout: window of each query head; `layout.num_kv_heads` is kv_heads.
        causal: queries see no later key.
        scale: factor on q·k; None is 1/sqrt(head_dim).
        softcap: > 0, bounds the scores smoothly.
        alibi_slopes: any floating dtype; a constant (no gradient).
        sink_logits: any floating dtype, differentiable.
        segment_ids: integers; an id may occur in several runs; negative is padding. The queries have the ids
            of the last q_len keys.
        round_probabilities: round as flash kernels do, see `AttentionCall`.
        return_stats: also return `AttentionStats`; changes no bit of the output or of its gradients.
        backend: "auto" or a name of `BACKENDS`.

    Returns:
        (batch, heads, q_len, head_dim) in the dtype of q; rows that see nothing are 0. With return_stats, a
        pair of this tensor and the statistics.

    Raises:
        TypeError: q, k, v or another tensor argument is not a tensor, or layout is not a HeadLayout.
        ValueError: a value, shape, device or dtype is not allowed, or the named backend does not support
            the call; the message names the argument.
    """
    q, k, v = cast_as_autocast(q, k, v)
    call, sink_logits, name = check_call(
        q, k, v, layout, causal=causal, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
        sink_logits=sink_logits, segment_ids=segment_ids, round_probabilities=round_probabilities,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip
    chosen = BACKENDS[name]
    if call.q.numel() == 0:
        result = _attend_to_nothing(call)
    elif autocast_is_on(call.q.device):
        with torch.autocast(call.q.device.type, enabled=False):
            result = chosen.attend(call)
    else:
        result = chosen.attend(call)
    out = result.out
    if sink_logits is not None:
        assert result.lse is not None
        out = with_sink_logits(out, result.lse, sink_logits).to(q.dtype)
    if not return_stats:
        return out
    assert result.lse is not None and result.max_logit is not None and result.entropy is not None
    return out, AttentionStats(result.lse, result.max_logit, result.entropy)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: HeadLayout,
    *,
    return_stats: bool = False,
    backend: str = "auto",
    **options: Unpack[AttentionOptions],
) -> Explanation:
    """Return which backend `attention` would use for the same arguments, and why it would not use the others.

    Args:
        q: as for `attention`, like all that follow.
        k: keys.
        v: values.
        layout: window of each head.
        return_stats: whether statistics are asked for.
        backend: "auto" or a name of `BACKENDS`.
        **options: the other arguments of `attention`.

    Raises:
        TypeError, ValueError: as `attention` does.
    """
    unknown = sorted(options.keys() - AttentionOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"explain takes the options of attention, got {unknown}")
    q, k, v = cast_as_autocast(q, k, v)
    call, _, chosen = check_call(q, k, v, layout, return_stats=return_stats, backend=backend, **options)
    not_taken = f"slower than {chosen}" if backend == "auto" else f"backend={chosen!r} was asked for"
    others = [name for name in BACKENDS if name != chosen]
    return Explanation(chosen, {name: _refusal(name, call, backend) or not_taken for name in others})


def _choose(call: AttentionCall, backend: str) -> str:
    if backend == "auto":
        reasons = []
        for name in BACKENDS:
            reason = _refusal(name, call, backend)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise ValueError(f"no backend can serve this call; {'; '.join(reasons)}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    reason = _refusal(backend, call, backend)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
    return backend


def _refusal(name: str, call: AttentionCall, asked_for: str) -> str | None:
    """Return why a backend does not serve a call for which this backend or "auto" was asked, or None."""
    reason = BACKENDS[name].supports(call)
    if reason is None and asked_for == "auto" and name in BY_NAME_ONLY:
        return "it is used by name only"
    return reason


def with_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Apply sink logits: exp(sink) in the softmax's denominator scales out by sigmoid(lse - sink).

    The factor is computed as exp(logsigmoid), whose gradient does not cancel where the sink is small.
    """
    seen = (lse > -torch.inf) | lse.isnan()
    # lse - sink of rows that see nothing would be -inf, whose gradient is NaN where a sink is -inf too
    shares = F.logsigmoid(torch.where(seen, lse, 0.0) - sink_logits[:, None]).exp()
    # a NaN sink or gradient does not pass through such rows either
    return out * torch.where(seen, shares, 0.0)[..., None]


def _attend_to_nothing(call: AttentionCall) -> Output:
    """Return the empty output of a call without queries; it still gives q, k and v zero gradients."""
    out = call.q + 0 * (call.k.sum() + call.v.sum())
    heads = call.q.shape[1]
    zeros = torch.zeros(heads, dtype=call.score_dtype, device=call.q.device)
    return Output(out, out.sum(-1).to(call.score_dtype), zeros, zeros.clone())


def cast_as_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast tensors to the dtype of `torch.autocast` where it is on, as SDPA does."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocast_is_on(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x for x in tensors)


def autocast_is_on(device: torch.device) -> bool:
    """Return whether `torch.autocast` applies to tensors on this device."""
    return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def check_call(
    q: Any, k: Any, v: Any, layout: Any, *, causal: Any = True, scale: Any = None, softcap: Any = None,
    alibi_slopes: Any = None, sink_logits: Any = None, segment_ids: Any = None,
    round_probabilities: Any = False, return_stats: Any = False, backend: Any = "auto",
) -> tuple[AttentionCall, Tensor | None, str]:  # fmt: skip
    """Check the arguments of `attention`, after `cast_as_autocast`.

    Returns:
        The call as backends get it, the sink logits, which no backend sees, and the name of the backend.

    Raises:
        TypeError, ValueError: as `attention` does.
    """
    if not isinstance(layout, HeadLayout):
        raise TypeError(f"layout must be a HeadLayout, got {type(layout).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, sequence, head_dim), got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q ({q.dtype}), got {x.dtype}")
        _require_device(name, x, q)
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if heads != layout.num_heads:
        raise ValueError(f"q must have the {layout.num_heads} heads of the layout, got {heads}")
    if head_dim < 1:
        raise ValueError(f"q must have a head_dim >= 1, got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        wanted = (batch, layout.num_kv_heads, kv_len, head_dim)
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{name} must be (batch, kv_heads, kv_len, head_dim) = {wanted} for q of shape "
                f"{tuple(q.shape)} and {layout!r}, got {tuple(x.shape)}"
            )
    if q_len > kv_len:
        raise ValueError(f"q must not be longer than k ({kv_len} keys), got {q_len} queries")

    for name, flag in (
        ("causal", causal), ("round_probabilities", round_probabilities), ("return_stats", return_stats),
    ):  # fmt: skip
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    _require_finite("scale", scale)
    if softcap is not None:
        _require_finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be > 0 or None, got {softcap!r}")
    score_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if alibi_slopes is not None:
        _require_per_head("alibi_slopes", alibi_slopes, q)
        if alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes must not require grad: they are constants; detach them")
        alibi_slopes = alibi_slopes.to(score_dtype)
    if sink_logits is not None:
        _require_per_head("sink_logits", sink_logits, q)
        sink_logits = sink_logits.to(score_dtype)
    if segment_ids is not None:
        require_tensor("segment_ids", segment_ids)
        if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
            raise ValueError(f"segment_ids must have an integer dtype, got {segment_ids.dtype}")
        if tuple(segment_ids.shape) != (batch, kv_len):
            raise ValueError(
                f"segment_ids must be (batch, kv_len) = {(batch, kv_len)}, got {tuple(segment_ids.shape)}"
            )
        _require_device("segment_ids", segment_ids, q)
        segment_ids = segment_ids.to(torch.int64)
    call = AttentionCall(
        q, k, v, layout, causal, float(scale), None if softcap is None else float(softcap), alibi_slopes,
        segment_ids, round_probabilities, with_lse=sink_logits is not None, with_stats=return_stats,
    )  # fmt: skip
    return call, sink_logits, _choose(call, backend)


def require_tensor(name: str, value: Any) -> None:
    """Raise a TypeError that names the argument unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _require_device(name: str, value: Tensor, q: Tensor) -> None:
    if value.device != q.device:
        raise ValueError(f"{name} must be on the device of q ({q.device}), got {value.device}")


def _require_per_head(name: str, value: Any, q: Tensor) -> None:
    require_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, got {value.dtype}")
    if tuple(value.shape) != (q.shape[1],):
        raise ValueError(f"{name} must be (heads,) = ({q.shape[1]},), got {tuple(value.shape)}")
    _require_device(name, value, q)


def _require_finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")

"""The call that a backend gets, and the output that it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class AttentionCall:
    """One validated call of `longshort.attention`, with at least one query.

    Attributes:
        q, k, v: all of one dtype and device, any strides; k_len >= q_len, aligned at the bottom right.
        layout: windows of the query heads.
        causal: whether a query sees later keys.
        scale: factor on q·k.
        softcap: c in z <- c·tanh(z/c), or None.
        alibi_slopes: slopes in z <- z - slope·|i - j|, in `score_dtype`, no gradient.
        segment_ids: int64 ids of all keys, negative is padding.
        round_probabilities: round exp(z - row maximum) to the dtype of v before it meets v, and P and dS
            likewise in the backward pass, as flash kernels do.
        with_lse: the caller combines `Output.out` with `Output.lse`. This may affect how `out` is computed.
        with_stats: the caller needs lse, max_logit and entropy. This may not change a bit of `out`.
    """

    q: Float[Tensor, "batch heads q_len head_dim"]
    k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    v: Float[Tensor, "batch kv_heads kv_len head_dim"]
    layout: HeadLayout
    causal: bool
    scale: float
    softcap: float | None
    alibi_slopes: Float[Tensor, " heads"] | None
    segment_ids: Int[Tensor, "batch kv_len"] | None
    round_probabilities: bool
    with_lse: bool
    with_stats: bool

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of `Output.out`."""
        return self.score_dtype if self.with_lse else self.q.dtype

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype of scores, sums and statistics: fp64 for fp64 inputs, fp32 for all others."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Output:
    """The result of a backend.

    Attributes:
        out: the output, in the dtype of q, or in `score_dtype` where the call asks for lse, since the
            caller computes further with it; zeros in rows that see nothing.
        lse: natural log of the sum of exp(z) over visible keys, differentiable, -inf in rows that see
            nothing; present where the call asks for lse or statistics. In the call's `score_dtype`.
        max_logit: largest |scale·q·k| over visible pairs, no gradient; present with statistics.
        entropy: mean entropy in nats of the rows that see something, no gradient; present with statistics.
    """

    out: Float[Tensor, "batch heads q_len head_dim"]
    lse: Float[Tensor, "batch heads q_len"] | None = None
    max_logit: Float[Tensor, " heads"] | None = None
    entropy: Float[Tensor, " heads"] | None = None


def output_from(
    call: AttentionCall, out: Tensor, row_max: Tensor, log_sum: Tensor, max_logit: Tensor, entropy: Tensor
) -> Output:
    """Make the output of a kernel that saves the maximum of each row and the log of its sum apart."""
    if not (call.with_lse or call.with_stats):
        return Output(out)
    # the gradient of log_sum is that of lse, since the row maximum counts as a constant
    lse = row_max.detach() + log_sum
    return Output(out, lse, max_logit.detach(), entropy.detach()) if call.with_stats else Output(out, lse)

"""Theory of a dense band: the rank of the target, and how large logits must be.

The theory is ours, not the paper's. Let T be a target whose rows are inside a band of l' keys, and P the
probabilities of causal attention whose logits are all within ± M. Row i sees m = i + 1 − l' keys outside the
band. Their mass is least if all band logits are M and all others −M; then the band's mass is
1 / (1 + (m/l')·e^(−2M)).
Since T is inside the band, KL(Tᵢ ‖ Pᵢ) ≥ −log(mass of the band) (data processing), so

    loss ≥ B(M) = mean over i of log(1 + max(0, i + 1 − l')/l' · e^(−2M)),

whatever the rank. B falls in M, so a loss bounds M from below: about ½·log(n / (2·l'·loss)).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshort.checks import require_integer

if TYPE_CHECKING:
    from jaxtyping import Float

_LARGEST_LOGIT = 1000.0
_HALVINGS = 60


def numerical_rank(matrix: Float[Tensor, "rows columns"], tolerance: float) -> int:
    """Count the singular values that are larger than `tolerance` times the largest.

    Raises:
        ValueError: tolerance is not within 0 ... 1.
    """
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance must be within 0 ... 1, got {tolerance}")
    values = torch.linalg.svdvals(matrix)
    return int((values > tolerance * values.max()).sum())


def loss_bound(length: int, span: int, max_logit: float) -> float:
    """Compute B(M) in nats: causal attention with logits within ± max_logit has no lower loss on a band.

    Raises:
        ValueError: length or span is not an integer >= 1, span > length, or max_logit is not >= 0.
    """
    _check(length, span)
    if not max_logit >= 0:
        raise ValueError(f"max_logit must be a number >= 0, got {max_logit}")
    outside = torch.arange(1 - span, length + 1 - span, dtype=torch.float64).clamp_min(0.0)
    return (outside / span * math.exp(-2 * max_logit)).log1p().mean().item()


def max_logit_bound(length: int, span: int, loss: float) -> float:
    """Compute the least M with B(M) <= loss: causal attention of that loss (nats) has a logit of at least M.
    It is ∞ for a loss of 0 if there are keys outside the band.

    Raises:
        ValueError: length or span is not an integer >= 1, span > length, or loss is not >= 0.
    """
    _check(length, span)
    if not loss >= 0:
        raise ValueError(f"loss must be a number >= 0, got {loss}")
    if loss >= loss_bound(length, span, 0.0):
        return 0.0
    if loss == 0:
        return math.inf
    low, high = 0.0, _LARGEST_LOGIT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if loss_bound(length, span, middle) > loss:
            low = middle
        else:
            high = middle
    return high


def least_loss_within(target: Float[Tensor, "n n"], max_logit: float) -> float:
    """Compute the lowest loss (nats) of causal attention on a target with logits within ± max_logit. It is
    exact for free rank (head_dim >= n), so a lower bound for any head_dim; it is at least `loss_bound`.

    A row's loss, lse(z) − T·z over a box, is convex. If zⱼ is inside the box, its gradient Pⱼ − Tⱼ is 0; at
    an end of the box it points outwards: zⱼ = clamp(log Tⱼ + c, −M, M) with c = lse(z). The lse of the right
    side grows slower than c, so c is found by bisection.

    Raises:
        ValueError: max_logit is not a finite number >= 0.
    """
    if not 0 <= max_logit < math.inf:
        raise ValueError(f"max_logit must be a finite number >= 0, got {max_logit}")
    target = target.double()
    n = len(target)
    band = target.topk(int((target > 0).sum(-1).max())).values  # all others are 0: their logits are −M
    is_band = band > 0
    outside = torch.arange(1, n + 1, dtype=target.dtype, device=target.device) - is_band.sum(-1)

    def logits(c: Tensor) -> Tensor:
        return (band.log() + c[:, None]).clamp(-max_logit, max_logit)

    def lse(z: Tensor) -> Tensor:
        return z.masked_fill(~is_band, -math.inf).logsumexp(-1).logaddexp(outside.log() - max_logit)

    low = target.new_full((n,), -max_logit)
    high = low + 2 * max_logit + math.log(n)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_low = lse(logits(middle)) > middle
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    z = logits(high)
    cross_entropy = (lse(z) - (band * z).sum(-1)).mean()
    return (cross_entropy - torch.special.entr(band).sum() / n).clamp_min(0.0).item()


def _check(length: int, span: int) -> None:
    require_integer("length", length, minimum=1)
    require_integer("span", span, minimum=1)
    if span > length:
        raise ValueError(f"span must be at most length ({length}), got {span}")

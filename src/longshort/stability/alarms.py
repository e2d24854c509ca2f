"""Alarms: scores of single attention heads that may rise before the loss of a training run does.

A score is one number per measurement, the higher the more alarming, and the largest of all heads. Whether a
score warns of anything is a question for experiments; `longshort study progress` asks it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from longshort.layers import LongShortAttention
from longshort.stability.ranks import whole

Alarm = Literal["row-range", "entropy", "update"]
"""The name of what an alarm watches in each head."""

ALARMS: tuple[Alarm, ...] = get_args(Alarm)
"""The names of all alarms."""

ALARM_MEASUREMENTS: dict[Alarm, str] = {
    "row-range": "row_range_by_head",
    "entropy": "entropy_by_head",
    "update": "update_entropy_by_head",
}
"""The attribute of a `Reading` that each alarm needs; a line of metrics.jsonl has it under the same name."""

ByHead = Sequence[Sequence[float | None]]
"""A number per layer and head; None or NaN where it is unknown."""


class RowRangeSlope:
    """Alarm "row-range": the slope of a head's log row range.

    A row of attention can sharpen only as far as its logits differ, so the range r is what grows when
    attention logits explode; that their growth foretells instability is from Wortsman et al. 2023 (arXiv
    2309.14322), who follow the largest logit. The score of a head is the least-squares slope of
    log max(r, 1) over the last `measurements` steps that were measured, per step: at 0.01 the range grows by
    a factor of e in 100 steps. A range below 1 counts as 1: it leaves the softmax nearly flat, and grows by
    large factors early in every run. There is no score before so many measurements.

    It needs `Reading.row_range_by_head`.
    """

    measurements = 10

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=self.measurements)
        self._logs: deque[list[float]] = deque(maxlen=self.measurements)  # by head

    def add(self, step: int, by_head: ByHead) -> float | None:
        """Record a measurement; return the score, None if no head has one."""
        self._steps.append(step)
        self._logs.append([math.log(max(value, 1.0)) for value in _flat(by_head)])  # NaN stays NaN
        if len(self._steps) < self.measurements:
            return None
        middle = sum(self._steps) / len(self._steps)
        distances = [at - middle for at in self._steps]
        squares = sum(distance**2 for distance in distances)
        return _largest(
            sum(distance * value for distance, value in zip(distances, values, strict=True)) / squares
            for values in zip(*self._logs, strict=True)
        )

    def state(self) -> dict[str, Any]:
        """Return what was recorded, for JSON."""
        return {"steps": list(self._steps), "logs": [list(map(_known, row)) for row in self._logs]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replace what was recorded by `state`."""
        self._steps = deque(state["steps"], maxlen=self.measurements)
        rows = [[_number(value) for value in row] for row in state["logs"]]
        self._logs = deque(rows, maxlen=self.measurements)


class EntropyFall:
    """Alarms "entropy" and "update": the fall of a head's entropy H below its largest so far.

    The score of a head is 1 - H / max H: 0 at a new maximum, 1 where nothing of it is left.

    - "entropy" takes the mean entropy of the rows of attention, `Reading.entropy_by_head`: its collapse goes
      with unstable training in Zhai et al. 2023 (arXiv 2303.06296).
    - "update" takes the spectral entropy of the head's update, `Reading.update_entropy_by_head`; see
      `UpdateEntropy`.
    """

    def __init__(self) -> None:
        self._highest: list[float] = []

    def add(self, step: int, by_head: ByHead) -> float | None:
        """Record a measurement; return the score, None if no head has one."""
        values = _flat(by_head)
        before = self._highest or [0.0] * len(values)
        self._highest = [max(highest, value) for highest, value in zip(before, values, strict=True)]
        return _largest(
            1 - value / highest
            for value, highest in zip(values, self._highest, strict=True)
            if highest > 0
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return what was recorded, for JSON."""
        return {"highest": list(self._highest)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replace what was recorded by `state`."""
        self._highest = list(state["highest"])


def alarm_score(alarm: Alarm) -> RowRangeSlope | EntropyFall:
    """Make the score of an alarm, with nothing recorded.

    Raises:
        ValueError: there is no such alarm.
    """
    if alarm not in ALARMS:
        raise ValueError(f"alarm must be one of {', '.join(ALARMS)}, got {alarm!r}")
    return RowRangeSlope() if alarm == "row-range" else EntropyFall()


@dataclass(frozen=True)
class QueryKeyWeights:
    """The weights of the queries and keys of a layer.

    Attributes:
        num_heads: the number of query heads.
        read: returns a copy of them, (heads + kv_heads, head_dim, embed_dim), those of queries first.
    """

    num_heads: int
    read: Callable[[], Tensor]


class UpdateEntropy:
    """Measures the spectral entropy of what training does to each head's product of query and key weights.

    A logit is xᵀ·M·y with M = W_Qᵀ·W_K, (embed_dim, embed_dim) of rank <= head_dim, but for what is done to
    queries and keys (scale, normalization, rotation, short convolution), which is left out. Between two
    measurements M changes by D = ΔW_Qᵀ·W_K + W_Qᵀ·ΔW_K, with the new W_K and the old W_Q. With the singular
    values σ of D and p = σ / Σσ, the entropy is -Σ p log p, in nats: 0 if the update has rank 1, at most
    log(2·head_dim). Query heads that share a key head each have their own M.

    After Huang et al. 2026 (arXiv 2606.28116), who find that the spectral entropy of the update's first-order
    term collapses before the loss diverges; D is the whole update, the second-order term included.

    It needs the weights alone, and keeps a copy of those of queries and keys. D is never formed: it is a
    product of thin factors, Aᵀ·B, so its singular values are those of R_A·R_Bᵀ, from the QR decompositions of
    Aᵀ and Bᵀ; in float64.

    Args:
        model: holds `LongShortAttention` layers; layers are counted in the order of `model.modules()`. The
            first measurement is that of the change from the weights at this moment.

    Raises:
        ValueError: the model has no such layer.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
        if not layers:
            raise ValueError(f"model must have LongShortAttention layers, got {type(model).__name__} without")
        self._layers = [_weights_of(layer) for layer in layers]
        self._before = [layer.read() for layer in self._layers]

    @classmethod
    def of_layers(cls, layers: Sequence[QueryKeyWeights]) -> UpdateEntropy:
        """Measure the weights of layers of another kind."""
        made = cls.__new__(cls)
        made._layers = list(layers)
        made._before = [layer.read() for layer in layers]
        return made

    @torch.no_grad()
    def measure(self) -> list[list[float]]:
        """Return the entropies of the updates since the last measurement: for each layer one number per head,
        NaN where nothing changed or a weight is not finite."""
        after = [layer.read() for layer in self._layers]
        found = [
            _update_entropies(layer.num_heads, old, new)
            for layer, old, new in zip(self._layers, self._before, after, strict=True)
        ]
        self._before = after
        return [entropies.tolist() for entropies in found]

    def state(self) -> dict[str, Tensor]:
        """Return the weights of the last measurement, by the number of their layer; `restore` takes them."""
        return {str(index): weights for index, weights in enumerate(self._before)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Let the next measurement be that of the change from the weights in `state`."""
        for index, weights in enumerate(self._before):
            weights.copy_(state[str(index)])


def _weights_of(layer: LongShortAttention) -> QueryKeyWeights:
    heads, kv_heads = layer.layout.num_heads, layer.layout.num_kv_heads

    def read() -> Tensor:
        rows = whole(layer.qkv_proj.weight.detach()).unflatten(0, (-1, layer.head_dim))
        return rows[: heads + kv_heads].clone()

    return QueryKeyWeights(heads, read)


def _update_entropies(num_heads: int, before: Tensor, after: Tensor) -> Tensor:
    group_size = num_heads // (len(before) - num_heads)
    old_q, new_q = before[:num_heads].double(), after[:num_heads].double()
    old_k, new_k = (
        weights[num_heads:].double().repeat_interleave(group_size, dim=0) for weights in (before, after)
    )
    # The differences first: they are small, and would drown in the rounding of the two products.
    factors = torch.cat([new_q - old_q, old_q], 1), torch.cat([new_k, new_k - old_k], 1)
    is_finite = torch.stack([factor.isfinite().all(-1).all(-1) for factor in factors]).all(0)
    r_a, r_b = (
        torch.linalg.qr(factor.masked_fill(~is_finite[:, None, None], 0.0).mT, mode="r").R
        for factor in factors
    )
    sizes = torch.linalg.svdvals(r_a @ r_b.mT)
    shares = sizes / sizes.sum(-1, keepdim=True)  # NaN if all are 0
    return torch.special.entr(shares).sum(-1)


def _flat(by_head: ByHead) -> list[float]:
    """Return the numbers of all heads; NaN where one is unknown or not finite."""
    return [_number(value) for layer in by_head for value in layer]


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _largest(scores: Any) -> float | None:
    return max((score for score in scores if not math.isnan(score)), default=None)

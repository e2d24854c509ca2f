"""The synthetic task of the paper's figure 2: fit a dense random band with free queries and keys.

Row i of the target is a softmax of N(0, σ²) logits over the last `span` tokens, its own included. Queries
and keys (length, head_dim) are the parameters; the loss is KL(target ‖ softmax(QKᵀ/√head_dim)), the mean over
the rows in nats, under a causal mask (global) or a sliding window (local). One seed gives all arms the same
target and the same initial parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from longshort.checks import check_fields
from longshort.training.config import Seed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Form = Literal["free", "learned", "rotary", "none"]
Optimizer = Literal["adam", "sgd"]
Precision = Literal["fp32", "bf16", "bf16-flash"]

HIDDEN_PROBABILITY = 1e-6
"""The assumed probability of a key of the band that the window hides; 0 would make the loss infinite.
The size of the loss of such a window is our convention; that it cannot be 0 is not."""

WINDOWS_PER_SPAN = (0.5, 1, 2, 4)
"""The windows w/l' of the grid; each fit keeps the largest logit inside each of them."""

LOSS_FLOOR = 1e-7
"""The smallest loss; lower ones count as this, since fp32 does not resolve them."""

PLATEAU_FALL = 0.05
"""A fit is on a plateau if the geometric mean of its loss over the last third of its steps is less than this
share below that over the third before. It is the same rule at every number of steps."""

POINTS_OF_A_CURVE = 40
_PLATEAU_STEPS = 100  # between two looks for a plateau; the first is after three times as many
_INITIAL_STD = 0.3
_LIMIT_WEIGHT = 1.0


@dataclass(frozen=True)
class Fit:
    """Everything that determines the result of a fit.

    Attributes:
        length: tokens n.
        head_dim: d.
        span: tokens l' that each row of the target depends on.
        window: keys that a query sees, its own included; None: all earlier ones.
        learning_rate: constant learning rate.
        steps: steps of the optimizer.
        seed: seed of the target, the initial parameters and, in a layer, the sequences.
        sigma: standard deviation of the target's logits.
        form: "free" queries and keys, or one attention layer with "learned", "rotary" or no positions.
        optimizer: Adam (betas 0.9, 0.999) or plain SGD.
        precision: as in `longshort.layers.ATTENTION_PRECISIONS`.
        alibi_slope: the ALiBi slope of the head; 0: none.
        start_window: window of a first stage of `steps` steps, before one with `window`; None: no such stage.
        logit_limit: search for the best fit whose logits are all within ± this; None: no limit.
        has_band: False spreads each row's targets over all tokens that it could see, as a control.
        crop: number of last rows and columns of target and fit to keep; 0: none.
        to_plateau: end the constant rate where the loss reaches a plateau (`PLATEAU_FALL`), after `steps` at
            the latest.
        decay_steps: steps after those at the constant rate, in which the rate falls to 0 in a line.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    length: Annotated[int, Ge(1)]
    head_dim: Annotated[int, Ge(1)]
    span: Annotated[int, Ge(1)]
    window: Annotated[int, Ge(1)] | None
    learning_rate: Annotated[float, Gt(0)]
    steps: Annotated[int, Ge(1)]
    seed: Seed
    sigma: Annotated[float, Ge(0)] = 1.0
    form: Form = "free"
    optimizer: Optimizer = "adam"
    precision: Precision = "fp32"
    alibi_slope: Annotated[float, Ge(0)] = 0.0
    start_window: Annotated[int, Ge(1)] | None = None
    logit_limit: Annotated[float, Gt(0)] | None = None
    has_band: bool = True
    crop: Annotated[int, Ge(0)] = 0
    to_plateau: bool = False
    decay_steps: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self, named=str)
        for name in ("span", "crop"):
            if getattr(self, name) > self.length:
                raise ValueError(f"{name} must be at most length ({self.length}), got {getattr(self, name)}")
        if self.form != "free" and (
            self.alibi_slope
            or self.start_window
            or self.logit_limit
            or self.crop
            or not self.has_band
            or self.to_plateau
            or self.decay_steps
        ):
            raise ValueError(
                "form must be 'free' with alibi_slope, start_window, logit_limit, crop, has_band=False, "
                f"to_plateau or decay_steps, got {self.form!r}"
            )


def make_target(fit: Fit, generator: torch.Generator) -> Float[Tensor, "length length"]:
    """Draw rows that sum to 1, fp64, zero outside the last `span` tokens; on the CPU, so the same everywhere.

    Without a band the same values are at tokens drawn from all that a row sees under the causal mask.
    """
    n, span = fit.length, fit.span
    drawn = fit.sigma * torch.randn(n, span, generator=generator, dtype=torch.float64)
    rows, offsets = torch.arange(n)[:, None], torch.arange(span)
    exists = offsets <= rows
    probabilities = drawn.masked_fill(~exists, -math.inf).softmax(-1)
    if fit.has_band:
        columns = rows - offsets
    else:
        order = torch.rand(n, n, generator=generator, dtype=torch.float64)
        columns = order.masked_fill(~visible_pairs(n, None), -1.0).argsort(dim=-1, descending=True)[:, :span]
    target = torch.zeros(n, n, dtype=torch.float64)
    target[rows.expand_as(columns)[exists], columns[exists]] = probabilities[exists]
    return target


def visible_pairs(
    length: int, window: int | None, device: torch.device | str | None = None
) -> Bool[Tensor, "length length"]:
    """Mark the visible pairs of queries (rows) and keys: i − window < j ≤ i."""
    distances = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    visible = distances >= 0
    return visible if window is None else visible & (distances < window)


class Loss:
    """The loss KL(target ‖ softmax(scores + bias)), the mean over the rows, in nats.

    Args:
        target: (n, n), rows sum to 1, fp64.
        visible: (n, n), the visible pairs.
        alibi_slope: slope·|i − j| is subtracted from each score.
        dtype: dtype of the computation.
    """

    def __init__(self, target: Tensor, visible: Tensor, alibi_slope: float, dtype: torch.dtype) -> None:
        n = len(target)
        positions = torch.arange(n, device=target.device)
        bias = -alibi_slope * (positions[:, None] - positions).abs().double()
        seen = target * visible
        hidden_mass = (target.sum() - seen.sum()) / n
        constant = -torch.special.entr(target).sum() / n - hidden_mass * math.log(HIDDEN_PROBABILITY)
        self._constant = float(constant - (seen * bias).sum() / n)
        self._seen = seen.to(dtype)
        self._seen_mass = seen.sum(-1).to(dtype)
        self._bias = bias.masked_fill(~visible, -math.inf).to(dtype)
        self._unmasked_bias = bias.to(dtype)

    def __call__(self, scores: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
        """Compute the loss of scores before bias and mask."""
        lse = (scores + self._bias).logsumexp(-1)
        return (lse @ self._seen_mass - (scores * self._seen).sum()) / len(scores) + self._constant

    def with_rounded_exponentials(self, scores: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
        """Compute the loss as flash kernels do: exp(z − row maximum) in bf16, with an exact denominator.

        Such probabilities do not quite sum to 1, so the loss may be a little below 0: it is for training.
        """
        biased = scores + self._bias
        maxima = biased.detach().amax(-1, keepdim=True)
        smallest = torch.finfo(scores.dtype).tiny  # the logarithm must be finite also where the target is 0
        exponentials = (biased - maxima).exp().bfloat16().to(scores.dtype).clamp_min(smallest)
        log_probabilities = exponentials.log() + maxima - biased.logsumexp(-1, keepdim=True)
        expected = (log_probabilities - self._unmasked_bias) * self._seen
        return self._constant - expected.sum() / len(scores)


def scores_of(queries: Tensor, keys: Tensor) -> Float[Tensor, "n n"]:
    """Compute QKᵀ/√head_dim."""
    return queries @ keys.T / math.sqrt(queries.shape[-1])


def least_loss(target: Float[Tensor, "n n"], visible: Bool[Tensor, "n n"]) -> float:
    """Compute the loss of the best probabilities on the visible keys: those of the target, scaled to sum to
    1; 0 if the window hides none of it."""
    seen = (target * visible).sum(-1)
    best = torch.where(visible, target, 0.0) / seen[:, None].clamp_min(torch.finfo(target.dtype).tiny)
    return Loss(target, visible, 0.0, target.dtype)(best.log().clamp_min(-1e4)).clamp_min(0.0).item()


def curve_steps(steps: int) -> list[int]:
    """List 0, then steps spread evenly on a logarithmic scale, up to the last."""
    share = math.log(steps) / (POINTS_OF_A_CURVE - 1)
    return [0, *sorted({round(math.exp(share * index)) for index in range(POINTS_OF_A_CURVE)})]


class Curve:
    """A curve of loss and largest logit by step; a value that is not finite is None.

    Args:
        steps: the last step, unless `end` names an earlier one.
    """

    def __init__(self, steps: int) -> None:
        self.due = curve_steps(steps)
        self._losses: list[float | None] = [None] * len(self.due)
        self._logits: list[float | None] = [None] * len(self.due)

    def add(self, step: int, loss: float, max_logit: float) -> None:
        index = self.due.index(step)
        self._losses[index], self._logits[index] = rounded_or_none(loss), rounded_or_none(max_logit)

    def end(self, step: int) -> None:
        """Make `step` the last of the curve, of which no later one was added."""
        self.due = [*(due for due in self.due if due < step), step]
        self._losses = [*self._losses, None][: len(self.due)]
        self._logits = [*self._logits, None][: len(self.due)]

    def as_json(self) -> dict[str, Any]:
        return {"steps": self.due, "losses": self._losses, "max_logits": self._logits}


def rounded_or_none(value: float) -> float | None:
    """Round to six digits, which keeps results small; None for what JSON cannot hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


class PlateauWatch:
    """Looks for a plateau in the losses of all steps so far."""

    def __init__(self) -> None:
        self._logs: list[float] = []

    def add(self, loss: float) -> bool:
        """Add the loss of a step, finite or not; return whether a plateau is reached, at every
        hundredth step from the 300th."""
        self._logs.append(math.log(max(loss, LOSS_FLOOR)) if math.isfinite(loss) else math.inf)
        count = len(self._logs)
        if count % _PLATEAU_STEPS or count < 3 * _PLATEAU_STEPS:
            return False
        before, last = self._logs[count // 3 : 2 * count // 3], self._logs[2 * count // 3 :]
        return fmean(last) - fmean(before) > math.log(1 - PLATEAU_FALL)


def make_optimizer(fit: Fit, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Make the fit's optimizer, with its learning rate."""
    if fit.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=fit.learning_rate)
    return torch.optim.SGD(parameters, lr=fit.learning_rate)


def windows_of_grid(span: int) -> list[int]:
    """Compute the window w, at least 1, for each of `WINDOWS_PER_SPAN`."""
    return [max(1, int(span * factor)) for factor in WINDOWS_PER_SPAN]


def run_fit(
    fit: Fit, device: torch.device | str, report_progress: Callable[[float], None] = lambda _share: None
) -> dict[str, Any]:
    """Fit free queries and keys.

    Returns:
        loss (nats), max_logit: at the end, largest |scale·q·k| over visible pairs; max_logit_in_band:
        [window, the same over the visible pairs inside that window] for each of `WINDOWS_PER_SPAN`;
        row_range: largest minus smallest logit of a row, the largest of all rows; least_loss: the least that
        the window allows; steps, losses, max_logits: curves; with start_window: `start`, loss and max_logit
        before the last stage; with crop: target and fit, lists of rows; with to_plateau: plateau_at, the
        step at which a plateau was reached, or None. All are measured in fp64 on queries
        and keys as the attention gets them. A number that was not finite is None.
    """
    generator = torch.Generator().manual_seed(fit.seed)
    target = make_target(fit, generator).to(device)
    initial = [_INITIAL_STD * torch.randn(fit.length, fit.head_dim, generator=generator) for _ in range(2)]
    parameters = [part.to(device).requires_grad_() for part in initial]
    stages = [fit.window] if fit.start_window is None else [fit.start_window, fit.window]
    result: dict[str, Any] = {}
    for number, window in enumerate(stages):
        if number:
            result = {"start": {name: result[name] for name in ("loss", "max_logit")}}
        visible = visible_pairs(fit.length, window, device)
        result |= _run_stage(
            fit, parameters, target, visible,
            lambda share, number=number: report_progress((number + share) / len(stages)),
        )  # fmt: skip
    return result


def _run_stage(
    fit: Fit,
    parameters: list[Tensor],
    target: Tensor,
    visible: Tensor,
    report_progress: Callable[[float], None],
) -> dict[str, Any]:
    exact = Loss(target, visible, fit.alibi_slope, torch.float64)
    loss = Loss(target, visible, fit.alibi_slope, torch.float32)
    compute = loss.with_rounded_exponentials if fit.precision == "bf16-flash" else loss
    optimizer = make_optimizer(fit, parameters)
    curve = Curve(fit.steps + fit.decay_steps)
    watch = PlateauWatch() if fit.to_plateau else None
    constant_steps, plateau_at = fit.steps, None
    for step in itertools.count():
        is_last = step == constant_steps + fit.decay_steps
        if is_last and plateau_at is not None:
            curve.end(step)
        if step in curve.due:
            with torch.no_grad():
                scores = _exact_scores(fit, parameters, visible)
                value, max_logit = exact(scores).item(), scores[visible].abs().max().item()
            curve.add(step, value, max_logit)
            report_progress(step / (fit.steps + fit.decay_steps))
            if is_last or not math.isfinite(value):
                break
        if step >= constant_steps:
            left = 1 - (step - constant_steps) / fit.decay_steps
            optimizer.param_groups[0]["lr"] = fit.learning_rate * left
        optimizer.zero_grad()
        scores = scores_of(*_rounded(fit, parameters))
        objective = compute(scores)
        if watch is not None and step < constant_steps and watch.add(objective.item()):
            constant_steps = plateau_at = step + 1
        if fit.logit_limit is not None:
            excess = (scores.abs() - fit.logit_limit).clamp_min(0.0) * visible
            objective = objective + _LIMIT_WEIGHT * excess.square().sum() / fit.length
        objective.backward()
        optimizer.step()
    scores = _exact_scores(fit, parameters, visible)
    return {
        **_at_the_end(fit, exact, scores, visible),
        "least_loss": rounded_or_none(least_loss(target, visible)),
        **curve.as_json(),
        **({"plateau_at": plateau_at} if fit.to_plateau else {}),
        **_crops(fit, target, scores, visible),
    }


def _rounded(fit: Fit, parameters: list[Tensor]) -> list[Tensor]:
    if fit.precision == "fp32":
        return parameters
    return [parameter.bfloat16().float() for parameter in parameters]


@torch.no_grad()
def _exact_scores(fit: Fit, parameters: list[Tensor], visible: Tensor) -> Float[Tensor, "n n"]:
    """Compute scores in fp64; if there is a limit, they are scaled down to it."""
    queries, keys = _rounded(fit, parameters)
    scores = scores_of(queries.double(), keys.double())
    if fit.logit_limit is None:
        return scores
    return scores * (fit.logit_limit / scores[visible].abs().max()).clamp_max(1.0)


def _at_the_end(fit: Fit, exact: Loss, scores: Tensor, visible: Tensor) -> dict[str, Any]:
    def largest(pairs: Tensor) -> float | None:
        return rounded_or_none(scores[pairs].abs().max().item())

    in_band = [
        [window, largest(visible & visible_pairs(fit.length, window, scores.device))]
        for window in windows_of_grid(fit.span)
    ]
    top = scores.masked_fill(~visible, -math.inf).amax(-1)
    bottom = scores.masked_fill(~visible, math.inf).amin(-1)
    return {
        "loss": rounded_or_none(exact(scores).item()),
        "max_logit": largest(visible),
        "max_logit_in_band": in_band,
        "row_range": rounded_or_none((top - bottom).max().item()),
    }


def _crops(fit: Fit, target: Tensor, scores: Tensor, visible: Tensor) -> Mapping[str, Any]:
    if not fit.crop:
        return {}
    positions = torch.arange(fit.length, device=scores.device)
    biased = scores - fit.alibi_slope * (positions[:, None] - positions).abs()
    fitted = biased.masked_fill(~visible, -math.inf).softmax(-1)

    def rows(matrix: Tensor) -> list[list[float]]:
        corner = matrix[-fit.crop :, -fit.crop :]
        return [[float(f"{value:.4g}") for value in row] for row in corner.tolist()]

    return {"target": rows(target), "fit": rows(fitted)}

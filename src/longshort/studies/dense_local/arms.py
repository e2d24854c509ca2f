"""The comparisons of the study `dense-local` at each scale.

An arm is a `Fit` without its seed and learning rate. Rates are half powers of ten to three digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, Literal

from longshort.layout import HeadLayout
from longshort.reporting.intervals import Interval
from longshort.studies.dense_local.task import (
    LOSS_FLOOR,
    WINDOWS_PER_SPAN,
    Fit,
    Optimizer,
    Precision,
    windows_of_grid,
)
from longshort.studies.framework.comparison import ArmResults, log_ratio, measure
from longshort.studies.framework.study import Results, Scale, Trial
from longshort.studies.framework.sweep import Arm, Ladder, Rate

Topic = Literal["grid", "narrow", "length", "head_dim", "sigma", "control", "shuffled", "precision", "layer"]

COMMON_RATE = 0.1
"""A learning rate that is in every sweep of free fits with Adam."""

ALIBI_SLOPE = 0.5
"""The slope of the control with ALiBi, the steepest of 8 heads."""

_SPANS_PER_HEAD_DIM = (0.5, 1, 4)
_CROP = 64
_LADDER = Ladder((0.0316, 0.1, 0.316), digits=3, extensions=4, loss="loss", floor=LOSS_FLOOR, tie=1e-3)
_SGD_RATES = (31.6, 100.0, 316.0)
_LAYER_RATES = (0.00316, 0.01, 0.0316)


@dataclass(frozen=True)
class Pair:
    """A local arm and the arm that it is compared with, most often a global one of the same fit.

    Attributes:
        topic: topic of the comparison; "grid" decides the verdicts, and "narrow" has the windows that cannot
            hold the dependency, w < l'.
        label: label for tables.
        local, other: the two fits, for any seed and rate.
        other_name: name of the other arm for legends.
    """

    topic: Topic
    label: str
    local: Fit
    other: Fit
    other_name: str = "global"

    @property
    def fits(self) -> tuple[Fit, Fit]:
        """The two fits, the local one first."""
        return self.local, self.other


@dataclass(frozen=True)
class MeasuredPair:
    """A pair whose arms were run on all seeds at their best rates."""

    pair: Pair
    local: ArmResults
    other: ArmResults

    def is_run_at(self, rate: Rate) -> bool:
        """Return whether both arms were run on all seeds at a rate."""
        return rate in self.local.by_rate and rate in self.other.by_rate

    def log_ratio(self, quantity: str, rate: Rate = "best") -> Interval:
        """Compute the log-ratio local / other over paired seeds."""
        return log_ratio(self.local, self.other, quantity, rate)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one scale.

    Attributes:
        steps: steps of each fit but those of the grid, at a constant rate.
        grid_length, length: tokens of the grid, and of everything else except the growth with the length.
        head_dim: d; the growth and the controls have l' = d and w = 2·l'.
        lengths, head_dims, sigmas: values for the growth of the logits.
        variants: precisions and optimizers beside fp32 and Adam.
        variants_on_grid: run them in every combination of the grid, not only at l' = d, w = 2·l'.
        logit_limits: limits within which the least loss is searched for.
        seeds: number of seeds.
        grid_steps: most steps of a fit of the grid at the constant rate, which ends on a plateau; the rate
            then falls to 0 over a tenth as many.
    """

    steps: int
    grid_length: int
    length: int
    head_dim: int
    lengths: Sequence[int]
    head_dims: Sequence[int]
    sigmas: Sequence[float]
    variants: Sequence[tuple[Precision, Optimizer]]
    variants_on_grid: bool
    logit_limits: Sequence[float]
    seeds: int
    grid_steps: int


_FEW_VARIANTS: tuple[tuple[Precision, Optimizer], ...] = (
    ("bf16", "adam"),
    ("bf16-flash", "adam"),
    ("fp32", "sgd"),
)
_ALL_VARIANTS: tuple[tuple[Precision, Optimizer], ...] = (
    *_FEW_VARIANTS,
    ("bf16", "sgd"),
    ("bf16-flash", "sgd"),
)

SIZES: dict[Scale, Sizes] = {
    "smoke": Sizes(6, 24, 24, 4, (16, 24), (4, 8), (1.0,), _FEW_VARIANTS, False, (4.0,), 2, grid_steps=300),
    "laptop": Sizes(
        1000, 512, 256, 16, (128, 256, 512), (8, 16, 32), (0.5, 1.0, 2.0), _FEW_VARIANTS, False,
        (3.0, 4.0, 6.0, 8.0, 12.0, 16.0), 3, grid_steps=9500,
    ),
    "overnight": Sizes(
        2000, 512, 512, 16, (128, 256, 512, 1024), (8, 16, 32, 64), (0.5, 1.0, 2.0, 4.0), _ALL_VARIANTS, True,
        (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0), 5, grid_steps=20_000,
    ),
    "paper": Sizes(
        2000, 2048, 2048, 64, (512, 1024, 2048, 4096), (16, 32, 64, 128), (0.5, 1.0, 2.0, 4.0), _ALL_VARIANTS,
        False, (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0), 5, grid_steps=20_000,
    ),
}  # fmt: skip


@cache
def pairs(scale: Scale) -> tuple[Pair, ...]:
    """List the pairs of a scale, the grid first."""
    sizes = SIZES[scale]
    grid = _grid(sizes)
    base = _base(sizes, sizes.length)
    found = [*grid]
    found += [_against_global("length", f"n = {n}", _base(sizes, n)) for n in sizes.lengths]
    found += [_against_global("head_dim", f"d = {d}", replace(base, head_dim=d)) for d in sizes.head_dims]
    found += [
        _against_global("sigma", f"σ = {sigma:g}", replace(base, sigma=sigma)) for sigma in sizes.sigmas
    ]
    found += _controls(base)
    found.append(_against_global("shuffled", "targets anywhere, no band", replace(base, has_band=False)))
    for precision, optimizer in sizes.variants:
        name = f"{precision}, {'Adam' if optimizer == 'adam' else 'SGD'}"
        changes: dict[str, Any] = {"precision": precision, "optimizer": optimizer}
        if sizes.variants_on_grid:
            found += [
                _against_global("precision", f"{name}, {pair.label}", replace(pair.local, **changes))
                for pair in grid
            ]
        else:
            found.append(_against_global("precision", name, replace(base, **changes)))
    for form, name in (("learned", "learned"), ("rotary", "rotary"), ("none", "no")):
        found.append(_against_global("layer", f"{name} positions", replace(base, form=form)))
    return tuple(found)


def _base(sizes: Sizes, length: int) -> Fit:
    span = sizes.head_dim
    return Fit(length, sizes.head_dim, span, 2 * span, learning_rate=1.0, steps=sizes.steps, seed=0)


def _against_global(topic: Topic, label: str, local: Fit) -> Pair:
    return Pair(topic, label, local, replace(local, window=None))


def _grid(sizes: Sizes) -> list[Pair]:
    """Pair local and global fits that are trained to a plateau."""
    found = []
    for per_head_dim, (index, per_span) in product(_SPANS_PER_HEAD_DIM, enumerate(WINDOWS_PER_SPAN)):
        span = int(per_head_dim * sizes.head_dim)
        local = replace(
            _base(sizes, sizes.grid_length),
            span=span,
            window=windows_of_grid(span)[index],
            steps=sizes.grid_steps,
            to_plateau=True,
            decay_steps=sizes.grid_steps // 10,
        )
        label = f"l'/d = {per_head_dim:g}, w/l' = {per_span:g}"
        found.append(_against_global("grid" if per_span >= 1 else "narrow", label, local))
    return found


def _controls(base: Fit) -> list[Pair]:
    whole = replace(base, window=None)
    wide = equal_freedom_head_dim(base)
    others = {
        "global with ALiBi": replace(whole, alibi_slope=ALIBI_SLOPE),
        f"global with d = {wide}": replace(whole, head_dim=wide),
        "global from the local fit": replace(whole, start_window=base.window),
    }
    return [Pair("control", f"local against {name}", base, other, name) for name, other in others.items()]


def equal_freedom_head_dim(local: Fit) -> int:
    """Compute the head_dim for global attention with as many parameters per visible score as a local fit."""
    scores = [
        HeadLayout((window,)).score_count(local.length, local.length) for window in (None, local.window)
    ]
    return round(local.head_dim * scores[0] / scores[1])


def arm_of(fit: Fit) -> Arm:
    """Make the arm of a fit, ignoring its seed and rate.

    Fits that are trained to a plateau have the rates of the global fit: a rate that is too low or too high
    for one side would be compared with a good one of the other.
    """
    ladder = _LADDER
    if fit.optimizer == "sgd":
        ladder = replace(_LADDER, rates=_SGD_RATES)
    elif fit.form != "free":
        ladder = replace(_LADDER, rates=_LAYER_RATES)
    is_led = fit.to_plateau and fit.window is not None
    return Arm(
        name_of(fit), partial(_trial, fit), ladder, arm_of(replace(fit, window=None)) if is_led else None
    )


_ADDED = {"to_plateau": False, "decay_steps": 0}
"""Fields that `Fit` did not always have, with the values that leave a trial what it was."""


def _trial(fit: Fit, rate: float, seed: int) -> Trial:
    fit = replace(fit, learning_rate=rate, seed=seed)
    seconds_of_step = 3e-4 + 1.2e-8 * fit.length**2  # on one core of a laptop
    stages = 1 if fit.start_window is None else 2
    forms = 1 if fit.form == "free" else 3
    work = (fit.steps + fit.decay_steps) * seconds_of_step * stages * forms
    settings = {name: value for name, value in asdict(fit).items() if _ADDED.get(name, ...) != value}
    return Trial(name_of(fit), seed, settings, work)


def name_of(fit: Fit) -> str:
    """Make the name of a fit's arm, which is unique."""
    parts = [
        "global" if fit.window is None else f"local w={fit.window}",
        f"n={fit.length} d={fit.head_dim} l'={fit.span} σ={fit.sigma:g}",
    ]
    if fit.form != "free":
        parts.append(f"layer, {fit.form} positions")
    if (fit.precision, fit.optimizer) != ("fp32", "adam"):
        parts.append(f"{fit.precision} {fit.optimizer}")
    if fit.alibi_slope:
        parts.append(f"ALiBi {fit.alibi_slope:g}")
    if fit.start_window is not None:
        parts.append(f"from w={fit.start_window}")
    if fit.logit_limit is not None:
        parts.append(f"logits within {fit.logit_limit:g}")
    if not fit.has_band:
        parts.append("no band")
    if fit.to_plateau:
        parts.append("to a plateau")
    if fit.crop:
        parts.append("drawn")
    return ", ".join(parts)


def measure_pairs(scale: Scale, seeds: Sequence[int], results: Results) -> dict[Pair, MeasuredPair]:
    """Collect the pairs of a scale whose trials at the best rates are done."""
    fits = dict.fromkeys(fit for pair in pairs(scale) for fit in pair.fits)
    measured = {fit: measure(arm_of(fit), seeds, results, ("best",)) for fit in fits}
    found = {}
    for pair in pairs(scale):
        local, other = (measured[fit] for fit in pair.fits)
        if local is not None and other is not None:
            found[pair] = MeasuredPair(pair, local, other)
    return found


def grid_ratios(
    scale: Scale, found: Mapping[Pair, MeasuredPair], quantity: str, rate: Rate = "best"
) -> dict[Pair, Interval | None]:
    """Collect log-ratios local / global of all combinations of the grid, in the order of the plan; None: not
    run."""
    return {
        pair: found[pair].log_ratio(quantity, rate) if pair in found and found[pair].is_run_at(rate) else None
        for pair in pairs(scale)
        if pair.topic == "grid"
    }


def speaking(intervals: Sequence[Interval]) -> tuple[int, int]:
    """Count the log-ratios that are evidence for local attention, and those against it."""
    return sum(interval.high < 0 for interval in intervals), sum(interval.low > 0 for interval in intervals)


def frontier_trials(scale: Scale, seed: int) -> list[Trial]:
    """List trials that search for the least loss of global attention within each limit, at two rates."""
    sizes = SIZES[scale]
    whole = replace(_base(sizes, sizes.length), window=None)
    return [
        _trial(replace(whole, logit_limit=limit), rate, seed)
        for limit in sizes.logit_limits
        for rate in _LADDER.rates[:2]
    ]


def illustrated_pair(scale: Scale) -> Pair:
    """Return the pair from which figure 2a,b is drawn, and with which the controls are compared."""
    sizes = SIZES[scale]
    return next(
        pair for pair in pairs(scale) if pair.topic == "length" and pair.label == f"n = {sizes.length}"
    )


def illustration(fit: Fit) -> Arm:
    """Make the arm whose results hold the crops."""
    return arm_of(replace(fit, crop=min(_CROP, fit.length)))

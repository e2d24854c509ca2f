"""What the study `dense-local` compares at each scale, and how the learning rate of each arm is found.

An arm is a `Fit` whose seed and rate are open. Rates lie on a ladder, 10^(rung/2). Each arm has a sweep of
its own on the first seed: three rungs, and one more at the edge where the best one lies, at most `EXTENSIONS`
times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

from longshort.layout import HeadLayout
from longshort.studies.dense_local_task import WINDOWS_PER_SPAN, Fit, Optimizer, Precision, windows_of_grid
from longshort.studies.study import Results, Scale, Trial

Topic = Literal["grid", "length", "head_dim", "sigma", "control", "shuffled", "precision", "layer"]

LOSS_FLOOR = 1e-7
"""Losses below it count as it: fp32 does not tell them apart."""

EXTENSIONS = 4
COMMON_RUNG = -2  # a rate that every sweep of free fits with Adam has
SPANS_PER_HEAD_DIM = (0.5, 1, 4)
ALIBI_SLOPE = 0.5  # the steepest of 8 heads
_TIE = 1e-3  # losses so much larger than the best, relatively, are as good
_CROP = 64


@dataclass(frozen=True)
class Pair:
    """A local arm and what it is compared with, most often a global one of the same fit.

    Attributes:
        topic: what the comparison is for; "grid" decides the verdicts.
        label: names it in tables.
        local, other: any seed and rate.
        other_name: names the other arm in legends.
    """

    topic: Topic
    label: str
    local: Fit
    other: Fit
    other_name: str = "global"


@dataclass(frozen=True)
class Sizes:
    """Of one scale.

    Attributes:
        steps: of each fit.
        grid_length, length: tokens of the grid, and of all else but the growth with the length.
        head_dim: d; the growth and the controls have l' = d and w = 2·l'.
        lengths, head_dims, sigmas: for the growth of the logits.
        variants: precisions and optimizers beside fp32 and Adam.
        variants_on_grid: have them in every combination of the grid, not at l' = d, w = 2·l' alone.
        logit_limits: of the search for the least loss within them.
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
    "smoke": Sizes(6, 24, 24, 4, (16, 24), (4, 8), (1.0,), _FEW_VARIANTS, False, (4.0,)),
    "laptop": Sizes(
        1000, 512, 256, 16, (128, 256, 512), (8, 16, 32), (0.5, 1.0, 2.0), _FEW_VARIANTS, False,
        (3.0, 4.0, 6.0, 8.0, 12.0, 16.0),
    ),
    "overnight": Sizes(
        2000, 512, 512, 16, (128, 256, 512, 1024), (8, 16, 32, 64), (0.5, 1.0, 2.0, 4.0), _ALL_VARIANTS, True,
        (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0),
    ),
    "paper": Sizes(
        2000, 2048, 2048, 64, (512, 1024, 2048, 4096), (16, 32, 64, 128), (0.5, 1.0, 2.0, 4.0), _ALL_VARIANTS,
        False, (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0),
    ),
}  # fmt: skip


@cache
def pairs(scale: Scale) -> tuple[Pair, ...]:
    """What is compared, the grid first."""
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


def open_rate(fit: Fit) -> Fit:
    """The arm of a fit: seed and rate are set to what every arm has."""
    return replace(fit, seed=0, learning_rate=1.0)


def _base(sizes: Sizes, length: int) -> Fit:
    span = sizes.head_dim
    return open_rate(Fit(length, sizes.head_dim, span, 2 * span, 1.0, sizes.steps, 0))


def _against_global(topic: Topic, label: str, local: Fit) -> Pair:
    return Pair(topic, label, local, replace(local, window=None))


def _grid(sizes: Sizes) -> list[Pair]:
    found = []
    for per_head_dim, (index, per_span) in product(SPANS_PER_HEAD_DIM, enumerate(WINDOWS_PER_SPAN)):
        span = int(per_head_dim * sizes.head_dim)
        window = windows_of_grid(span)[index]
        local = replace(_base(sizes, sizes.grid_length), span=span, window=window)
        found.append(_against_global("grid", f"l'/d = {per_head_dim:g}, w/l' = {per_span:g}", local))
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
    """The head_dim that gives global attention as many parameters per visible score as the local fit has."""
    scores = [
        HeadLayout((window,)).score_count(local.length, local.length) for window in (None, local.window)
    ]
    return round(local.head_dim * scores[0] / scores[1])


def rate_of(rung: int) -> float:
    """10^(rung/2), to three digits."""
    return float(f"{10 ** (rung / 2):.3g}")


def trial_of(arm: Fit, rung: int, seed: int) -> Trial:
    """The trial of an arm at a rate."""
    fit = replace(arm, learning_rate=rate_of(rung), seed=seed)
    seconds_of_step = 3e-4 + 1.2e-8 * fit.length**2  # of a laptop's core
    stages = 1 if fit.start_window is None else 2
    forms = 1 if fit.form == "free" else 3
    return Trial(name_of(fit), seed, asdict(fit), fit.steps * seconds_of_step * stages * forms)


def name_of(fit: Fit) -> str:
    """Tells an arm from all others."""
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
    if fit.crop:
        parts.append("drawn")
    return ", ".join(parts)


@dataclass(frozen=True)
class Sweep:
    """How far the search for an arm's rate is.

    Attributes:
        rungs: to try, rising.
        best: rung of the lowest loss, of several as low the lowest rung; None: not known yet.
        is_at_edge: the best is the first or last rung though the sweep was extended as far as it may.
    """

    rungs: tuple[int, ...]
    best: int | None
    is_at_edge: bool


def sweep(arm: Fit, results: Results, seed: int = 0) -> Sweep:
    """The sweep of an arm, on one seed, as far as results go."""
    rungs = _first_rungs(arm)
    for extension in range(EXTENSIONS + 1):
        found = {rung: results.get(trial_of(arm, rung, seed).key) for rung in rungs}
        if any(result is None for result in found.values()):
            return Sweep(tuple(rungs), None, False)
        losses = {
            rung: max(result["loss"], LOSS_FLOOR)
            for rung, result in found.items()
            if result is not None and result["loss"] is not None
        }
        least = min(losses.values(), default=0.0)
        best = min((rung for rung, loss in losses.items() if loss <= least * (1 + _TIE)), default=rungs[0])
        if best not in (rungs[0], rungs[-1]):
            return Sweep(tuple(rungs), best, False)
        if extension == EXTENSIONS:
            return Sweep(tuple(rungs), best, True)
        rungs = [rungs[0] - 1, *rungs] if best == rungs[0] else [*rungs, rungs[-1] + 1]
    raise AssertionError("the loop returns")


def _first_rungs(arm: Fit) -> list[int]:
    if arm.optimizer == "sgd":
        return [3, 4, 5]
    return [-3, -2, -1] if arm.form == "free" else [-5, -4, -3]


def frontier_trials(scale: Scale, seed: int) -> list[Trial]:
    """Searches for the least loss of global attention within each limit, at two rates."""
    sizes = SIZES[scale]
    whole = replace(_base(sizes, sizes.length), window=None)
    return [
        trial_of(replace(whole, logit_limit=limit), rung, seed)
        for limit in sizes.logit_limits
        for rung in (-3, -2)
    ]


def illustrated_pair(scale: Scale) -> Pair:
    """What figure 2a,b is drawn from; also what the controls are compared with."""
    sizes = SIZES[scale]
    return next(
        pair for pair in pairs(scale) if pair.topic == "length" and pair.label == f"n = {sizes.length}"
    )


def illustration(arm: Fit) -> Fit:
    """The arm whose results hold the crops."""
    return replace(arm, crop=min(_CROP, arm.length))

"""The findings of the study `dense-local` in words, tables and figures, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longshort.reporting.intervals import Interval, confidence_interval
from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import Panel, draw_curves, draw_points
from longshort.studies.dense_local.arms import (
    ALIBI_SLOPE,
    COMMON_RATE,
    SIZES,
    MeasuredPair,
    Pair,
    Sizes,
    Topic,
    arm_of,
    equal_freedom_head_dim,
    frontier_trials,
    grid_ratios,
    illustrated_pair,
    illustration,
    pairs,
    speaking,
)
from longshort.studies.dense_local.figures import Points, draw_bounds, draw_grid, draw_heat_maps
from longshort.studies.dense_local.task import HIDDEN_PROBABILITY, WINDOWS_PER_SPAN, make_target
from longshort.studies.dense_local.theory import (
    least_loss_within,
    loss_bound,
    max_logit_bound,
    numerical_rank,
)
from longshort.studies.framework.comparison import ArmResults, edge_text, interval_text, mean_text
from longshort.studies.framework.study import Results, Scale
from longshort.studies.framework.sweep import Rate, sweep

_WINDOW_NAMES = dict(zip(WINDOWS_PER_SPAN, ("½·l'", "l'", "2·l'", "4·l'"), strict=True))
_TOLERANCES = (0.1, 0.01, 0.001)
_BOUND_POINTS = 60


@dataclass(frozen=True)
class _Found:
    """The results to report."""

    scale: Scale
    seeds: Sequence[int]
    results: Results
    pairs: Mapping[Pair, MeasuredPair]
    folder: Path

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.scale]

    def of_topics(self, *topics: Topic) -> list[MeasuredPair]:
        return [measured for pair, measured in self.pairs.items() if pair.topic in topics]


def sections(
    scale: Scale,
    seeds: Sequence[int],
    results: Results,
    measured: Mapping[Pair, MeasuredPair],
    folder: Path,
) -> list[Section]:
    """Write the sections of the report and draw their figures into a folder. What is not run is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    found = _Found(scale, seeds, results, measured, folder)
    return [
        _illustration(found),
        _losses(found),
        _logits(found),
        _narrow(found),
        _growth(found),
        _controls(found),
        _pairs(
            found, "Precisions and optimizers", ("precision",),
            "Precision and optimizer change sizes. bf16 rounds queries and keys; bf16-flash also rounds the "
            "exponentials, as flash kernels do, which lets whole rows of logits drift, since softmax does "
            "not see what is common to a row: the row range is how far apart the logits of a row are.",
        ),
        _pairs(
            found, "Through a real attention layer", ("layer",),
            "One attention layer of one head on new random tokens in each step, with learned, rotary and no "
            "positions, learns weighted means over the last l' tokens; the weights depend on both tokens. "
            "Its loss is the error's mean square over that of the wanted outputs, on unseen sequences.",
        ),
        _theory(found),
        _method(found),
    ]  # fmt: skip


def _illustration(found: _Found) -> Section:
    pair = illustrated_pair(found.scale)
    fit = pair.local
    drawn = {"global": pair.other, "local": fit}
    scores = {
        name: sum(min(position + 1, arm.window or arm.length) for position in range(arm.length))
        for name, arm in drawn.items()
    }
    freedom = 2 * fit.length * fit.head_dim
    text = (
        f"Of n = {fit.length} tokens, each depends on its last l' = {fit.span}. Queries and keys of width "
        f"d = {fit.head_dim} are {freedom:,} numbers, with which global attention draws {scores['global']:,} "
        f"scores and local attention (w = {fit.window}) {scores['local']:,}: "
        f"{freedom / scores['global']:.2g} and {freedom / scores['local']:.2g} numbers per score."
    )
    crops = {}
    for name, arm in drawn.items():
        swept = sweep(arm_of(arm), found.results, found.seeds[0])
        if swept.is_done:
            crops[name] = found.results.get(illustration(arm).trial(swept.best, found.seeds[0]).key)
    figures = []
    if all(crops.get(name) for name in drawn):
        matrices = {"Target": crops["global"]["target"]}
        matrices |= {f"{name.capitalize()} fit": crops[name]["fit"] for name in drawn}
        file = draw_heat_maps(matrices, fit.length - len(matrices["Target"]), found.folder / "heatmaps.png")
        figures.append(
            Figure(
                file,
                "The last queries and keys of the target and of both fits (first seed). What global "
                "attention leaves outside the band is its error; local attention cannot put anything outside "
                "its window.",
            )
        )
    return Section("Target and fits (F2a,b)", [text], figures=figures)


def _losses(found: _Found) -> Section:
    grid = found.of_topics("grid")
    texts = []
    if grid:
        below, above = speaking([m.log_ratio("loss") for m in grid])
        texts = [
            (
                f"Both sides are trained at equal rates to a plateau, for {found.sizes.grid_steps:,} steps "
                "at the most, and then while the rate falls to 0. At the rates that are best for the global "
                f"side local attention's loss is lower in {below} of {len(grid)} combinations and higher in "
                f"{above}. The last column is the mean step at which the plateaus were reached."
            )
        ]
    table = _table(
        grid,
        {
            "global": lambda m: _mean(m.other, "loss"),
            "local": lambda m: _mean(m.local, "loss"),
            "local / global": _ratio("loss"),
            "at the lower rate": _ratio("loss", "lower"),
            "plateau, global / local": lambda m: f"{_plateau(m.other)} / {_plateau(m.local)}",
        },
    )
    tables = {
        title: {
            (f"{pair.local.span / pair.local.head_dim:g}", f"{_windows(pair):g}"): interval
            for pair, interval in grid_ratios(found.scale, found.pairs, quantity).items()
        }
        for title, quantity in (("Final loss", "loss"), ("Largest logit", "max_logit"))
    }
    return Section(
        "Training loss (F2c)",
        texts,
        table=table,
        figures=[
            Figure(
                _draw_curves(found, "losses", "loss (nats)", "loss.png"),
                "Loss (KL, nats) by step; faint lines are seeds. Fits of the grid have the global side's "
                "best rate, controls each their own.",
            ),
            Figure(
                draw_grid(tables, found.folder / "grid.png"),
                "Local over global at the global side's best rates, with 95 % intervals over paired seeds: "
                "below 1 speaks for the claims. Bold: the interval excludes 1.",
            ),
        ],
    )


def _plateau(arm: ArmResults) -> str:
    """Return the mean step at which the fits reached a plateau, or say how many did not."""
    steps = [result["plateau_at"] for result in arm.results()]
    late = steps.count(None)
    return f"not reached by {late} of {len(steps)}" if late else f"{fmean(steps):,.0f}"


def _narrow(found: _Found) -> Section:
    """Report the windows that cannot hold the dependency."""
    text = (
        "A window that is narrower than the dependency (w < l') cannot reach the target, so these fits do "
        "not count. The third column is the least loss that the window allows. How large that is, is our "
        f"convention: a hidden key counts as if it had probability {HIDDEN_PROBABILITY:g}, where KL would be "
        "infinite."
    )
    table = _table(
        found.of_topics("narrow"),
        {
            "loss, global": lambda m: _mean(m.other, "loss"),
            "loss, local": lambda m: _mean(m.local, "loss"),
            "window allows": lambda m: mean_text(result["least_loss"] for result in m.local.results()),
            "largest logit, global": lambda m: _mean(m.other, "max_logit"),
            "largest logit, local": lambda m: _mean(m.local, "max_logit"),
        },
    )
    return Section("Windows that are too narrow", [text], table=table)


def _logits(found: _Found) -> Section:
    grid = found.of_topics("grid")
    texts = []
    if grid:
        below, above = speaking([m.log_ratio("max_logit") for m in grid])
        texts = [
            (
                f"Local attention's largest logit is smaller in {below} of {len(grid)} combinations and "
                f"larger in {above}, at the global side's best rate. The second column is of global "
                "attention over the pairs that local attention sees too. The row range is the largest "
                "difference of two logits of one query: softmax sees only that."
            )
        ]
    table = _table(
        grid,
        {
            "global": lambda m: _mean(m.other, "max_logit"),
            "global, in the window": lambda m: mean_text(
                dict(result["max_logit_in_band"]).get(m.pair.local.window) for result in m.other.results()
            ),
            "local": lambda m: _mean(m.local, "max_logit"),
            "local / global": _ratio("max_logit"),
            "at the lower rate": _ratio("max_logit", "lower"),
            "row range, ratio": _ratio("row_range"),
        },
    )
    file = _draw_curves(found, "max_logits", "largest |scale · q·k|", "logits.png")
    caption = "Largest |scale·q·k| over visible pairs by step; rates and lines as above."
    return Section("Largest logit (F2d)", texts, table=table, figures=[Figure(file, caption)])


def _windows(pair: Pair) -> float:
    """Return the window of a pair's local arm, in spans."""
    assert pair.local.window is not None
    return pair.local.window / pair.local.span


def _draw_curves(found: _Found, quantity: str, label: str, file: str) -> Path:
    """Draw curves by step: a panel per l'/d of the grid, and one of the controls."""
    panels: dict[str, dict[str, Any]] = {}
    illustrated = illustrated_pair(found.scale)
    chosen = found.of_topics("grid", "control")
    if illustrated in found.pairs:
        chosen.append(found.pairs[illustrated])
    for measured in chosen:
        pair = measured.pair
        title = f"Controls, n = {pair.local.length}"
        if pair.topic == "grid":
            title = f"l'/d = {pair.local.span / pair.local.head_dim:g}"
        lines = panels.setdefault(title, {})
        lines.setdefault(pair.other_name, _curves(measured.other, quantity))
        lines.setdefault(f"local, w = {_WINDOW_NAMES[_windows(pair)]}", _curves(measured.local, quantity))
    drawn = [Panel(title, "step", label, lines) for title, lines in panels.items()]
    return draw_curves(drawn or [Panel("", "step", label, {})], found.folder / file, height=3.2)


def _curves(arm: ArmResults, quantity: str) -> list[list[tuple[float, float | None]]]:
    return [list(zip(result["steps"], result[quantity], strict=True)) for result in arm.results()]


def _growth(found: _Found) -> Section:
    """Report the largest logit by n, d and σ."""
    sizes = found.sizes
    topics: tuple[tuple[Topic, str, str, Sequence[float]], ...] = (
        ("length", "By length", "tokens n", sizes.lengths),
        ("head_dim", "By width", "head_dim d", sizes.head_dims),
        ("sigma", "By target", "σ of the target's logits", sizes.sigmas),
    )
    panels: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    texts = []
    for topic, title, label, values in topics:
        lines: dict[str, list[tuple[float, Interval]]] = {"local": [], "global": [], "global, at least": []}
        panels[title] = lines
        at = dict(zip((pair for pair in pairs(found.scale) if pair.topic == topic), values, strict=True))
        for measured in found.of_topics(topic):
            value = at[measured.pair]
            for name, arm in (("local", measured.local), ("global", measured.other)):
                lines[name].append((value, confidence_interval(arm.values("max_logit").values())))
            loss, fit = measured.other.mean("loss"), measured.pair.other
            if math.isfinite(loss):
                bound = max_logit_bound(fit.length, fit.span, loss)
                lines["global, at least"].append((value, Interval(bound, -math.inf, math.inf, 1)))
        ends = [
            f"{name} from {number(lines[name][0][1].mean)} to {number(lines[name][-1][1].mean)}"
            for name in ("global", "local")
            if len(lines[name]) > 1
        ]
        if ends:
            texts.append(f"With {label} from {values[0]:g} to {values[-1]:g}: {', '.join(ends)}.")
    base = illustrated_pair(found.scale).local
    text = (
        f"The largest logit with l' = {base.span}, w = {base.window}, else n = {base.length}, d = "
        f"{base.head_dim}, σ = {base.sigma:g}. {' '.join(texts)} Best rates differ, and a higher rate may "
        "make larger logits: the last two columns are of one rate and the first seed."
    )

    def at_common_rate(arm: ArmResults) -> str:
        return number(found.results[arm.arm.trial(COMMON_RATE, found.seeds[0]).key]["max_logit"])

    table = _table(
        found.of_topics("length", "head_dim", "sigma"),
        {
            "global": lambda m: _mean(m.other, "max_logit"),
            "local": lambda m: _mean(m.local, "max_logit"),
            f"global, rate {COMMON_RATE:g}": lambda m: at_common_rate(m.other),
            f"local, rate {COMMON_RATE:g}": lambda m: at_common_rate(m.local),
        },
        "largest logit",
    )
    file = draw_points(
        panels, found.folder / "growth.png", [label for _, _, label, _ in topics], "largest |scale · q·k|"
    )
    caption = (
        "At each arm's best rate, means with 95 % intervals. At least: what global attention's logits must "
        "reach for the loss that it reached (below)."
    )
    return Section("Growth of the largest logit", [text], table=table, figures=[Figure(file, caption)])


def _controls(found: _Found) -> Section:
    """Report the controls: ALiBi, equal freedom, a start from the local fit, targets without a band."""
    base = illustrated_pair(found.scale).local
    texts = [
        (
            f"Is it the window, or what comes with it? Global attention with ALiBi (slope {ALIBI_SLOPE:g}) "
            f"is made to look near; with d = {equal_freedom_head_dim(base)} it has as many parameters per "
            "score as local attention; from the local fit it starts where local attention ended. With "
            "targets anywhere instead of in a band, local attention must lose: it cannot see most of them."
        )
    ]
    for measured in found.of_topics("control"):
        if measured.pair.other.start_window is None:
            continue
        results = measured.other.results()
        started = [mean_text(result["start"][name] for result in results) for name in ("loss", "max_logit")]
        seen = [mean_text(result[name][0] for result in results) for name in ("losses", "max_logits")]
        texts.append(
            f"The local fit had loss {started[0]} and largest logit {started[1]} in its window. Seen by "
            f"global attention, it has {seen[0]} and {seen[1]}; trained from there, global attention ended "
            f"with {_mean(measured.other, 'loss')} and {_mean(measured.other, 'max_logit')}."
        )
    return _pairs(found, "Controls", ("control", "shuffled"), *texts)


def _pairs(found: _Found, heading: str, topics: Sequence[Topic], *texts: str) -> Section:
    """Make a section with a row per pair of these topics."""
    table = _table(
        found.of_topics(*topics),
        {
            "loss, global": lambda m: _mean(m.other, "loss"),
            "loss, local": lambda m: _mean(m.local, "loss"),
            "local / global": _ratio("loss"),
            "largest logit, global": lambda m: _mean(m.other, "max_logit"),
            "largest logit, local": lambda m: _mean(m.local, "max_logit"),
            "largest logit, local / global": _ratio("max_logit"),
            "row range, ratio": _ratio("row_range"),
        },
    )
    return Section(heading, texts, table=table)


def _theory(found: _Found) -> Section:
    """Report the rank of the target, and the logits that a loss needs."""
    pair, seed = illustrated_pair(found.scale), found.seeds[0]
    fit, limits = pair.other, found.sizes.logit_limits
    target = make_target(fit, torch.Generator().manual_seed(seed))
    ranks = ", ".join(f"{numerical_rank(target, tolerance)} at {tolerance:g}" for tolerance in _TOLERANCES)
    texts = [
        (
            f"The target (n = {fit.length}, l' = {fit.span}, seed {seed}) has numerical rank {ranks} "
            "(singular values above that share of the largest), where the logits of global attention have "
            f"rank {fit.head_dim}. That is no proof that it cannot be drawn: softmax is not linear, and "
            "large logits buy rank."
        ),
        (
            "How large must they be? If all logits are within ± M, some probability falls outside the band "
            "whatever the rank: loss ≥ mean over rows of log(1 + (keys outside / l')·e^(−2M)), so M ≥ about "
            "½·log(n / (2·l'·loss)). With the target known the least loss for M can be computed exactly for "
            f"any rank. For rank {fit.head_dim} we have only fits that were held within M: a numerical upper "
            "bound, not the least loss. The last column is the loss of the global fit, which nothing held, "
            "when its logits had grown to M."
        ),
    ]
    held: dict[float, float] = {}
    for trial in frontier_trials(found.scale, seed):
        loss = found.results.get(trial.key, {}).get("loss")
        if loss is not None:
            limit = trial.settings["logit_limit"]
            held[limit] = min(loss, held.get(limit, math.inf))
    paths: dict[str, Points] = {}
    if pair in found.pairs:
        for name, arm in (("global", found.pairs[pair].other), ("local", found.pairs[pair].local)):
            first = arm.results()[0]
            path = zip(first["max_logits"], first["losses"], strict=True)
            paths[f"{name}, step by step"] = [
                (x, y) for x, y in path if x is not None and y is not None and y > 0
            ]
    free = paths.get("global, step by step", ())
    rows = [
        (
            f"{limit:g}",
            number(loss_bound(fit.length, fit.span, limit)),
            number(least_loss_within(target, limit)),
            number(held[limit]) if limit in held else "not run",
            number(min((y for x, y in free if x <= limit), default=None)),
        )
        for limit in limits
    ]
    header = ("M", "bound", "least loss, any rank", f"held within M, rank {fit.head_dim}", "not held")
    largest = max([x for points in paths.values() for x, _ in points] + list(limits))
    at = [largest * (index + 1) / _BOUND_POINTS for index in range(_BOUND_POINTS)]
    bounds = {
        "global: bound, any target in the band": [(m, loss_bound(fit.length, fit.span, m)) for m in at],
        "global: least loss for this target, any rank": [(m, least_loss_within(target, m)) for m in at],
    }
    best = {f"global: best fit found within the limit, rank {fit.head_dim}": sorted(held.items())}
    file = draw_bounds(bounds, best, paths, found.folder / "bounds.png")
    caption = f"Seed {seed} at the best rates. Global attention can be nowhere below the dotted lines."
    return Section(
        "Theory: rank and logits", texts, table=Table(header, rows), figures=[Figure(file, caption)]
    )


def _method(found: _Found) -> Section:
    """Report rates and rules."""
    text = (
        f"{found.sizes.steps:,} steps at a constant rate, but to a plateau where l' and w vary; "
        f"{len(found.seeds)} seeds. One seed gives all arms the same target and the same initial queries and "
        "keys. Each arm has its own sweep of rates in steps of √10 on the first seed, extended where the "
        "best lies at an edge; where l' and w vary the global side's is that of both. Of rates whose losses "
        "are alike the lowest counts as best. 95 % intervals are Student's, over paired seeds."
    )
    arms = [arm for measured in found.pairs.values() for arm in (measured.local, measured.other)]
    table = _table(
        list(found.pairs.values()),
        {
            "global or other": lambda m: f"{m.other.sweep.best:g}",
            "local": lambda m: f"{m.local.sweep.best:g}",
        },
        "best rate",
    )
    edges = edge_text(arms).strip() or "No best rate lies at the edge of its sweep."
    return Section("How this was run", [text, edges], table=table)


def _table(
    rows: Sequence[MeasuredPair], columns: Mapping[str, Callable[[MeasuredPair], str]], first: str = ""
) -> Table:
    """Make a table with a row per pair: its label, and the text of each column."""
    cells = [(row.pair.label, *(column(row) for column in columns.values())) for row in rows]
    return Table((first, *columns), cells)


def _mean(arm: ArmResults, quantity: str) -> str:
    return number(arm.mean(quantity))


def _ratio(quantity: str, rate: Rate = "best") -> Callable[[MeasuredPair], str]:
    """Make a column of ratios local / other; a cell is empty if the rate was not run."""

    def column(measured: MeasuredPair) -> str:
        is_run = measured.is_run_at(rate)
        return interval_text(measured.log_ratio(quantity, rate).exp()) if is_run else ""

    return column

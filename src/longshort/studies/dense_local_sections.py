"""The findings of `dense-local` beside the verdicts: growth, controls, other forms, theory, method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from longshort.reporting.intervals import Interval, confidence_interval
from longshort.reporting.page import Figure, Section, Table, number
from longshort.studies.comparison import interval_text
from longshort.studies.dense_local_arms import (
    ALIBI_SLOPE,
    COMMON_RUNG,
    SIZES,
    Topic,
    equal_freedom_head_dim,
    frontier_trials,
    illustrated_pair,
    name_of,
    pairs,
    rate_of,
    sweep,
    trial_of,
)
from longshort.studies.dense_local_figures import (
    Points,
    draw_bounds,
    draw_growth,
)
from longshort.studies.dense_local_task import make_target
from longshort.studies.dense_local_theory import (
    least_loss_within,
    loss_bound,
    max_logit_bound,
    numerical_rank,
)
from longshort.studies.dense_local_verdicts import (
    Side,
    compare,
)
from longshort.studies.study import Results, Scale

_TOLERANCES = (0.1, 0.01, 0.001)
_BOUND_POINTS = 60


def growth_section(scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Section:
    """The largest logit by n, d and σ."""
    sizes = SIZES[scale]
    topics: tuple[tuple[Topic, str, Sequence[float]], ...] = (
        ("length", "tokens n", sizes.lengths),
        ("head_dim", "head_dim d", sizes.head_dims),
        ("sigma", "σ of the target's logits", sizes.sigmas),
    )
    panels: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    bounds: dict[str, list[tuple[float, float]]] = {}
    texts, rows = [], []
    for topic, label, values in topics:
        panels[label], bounds[label] = {"global": [], "local": []}, []
        found = [compare(pair, seeds, results) for pair in pairs(scale) if pair.topic == topic]
        for value, comparison in zip(values, found, strict=True):
            if comparison is None:
                continue
            for name, side in (("global", comparison.other), ("local", comparison.local)):
                interval = confidence_interval(side.values("max_logit").values())
                panels[label][name].append((value, interval))
            sides = (comparison.other, comparison.local)
            at_common = [
                results[trial_of(side.arm, COMMON_RUNG, seeds[0]).key]["max_logit"] for side in sides
            ]
            rows.append(
                (
                    comparison.pair.label, *(mean_text(side, "max_logit") for side in sides),
                    *(number(value) for value in at_common),
                )
            )  # fmt: skip
            loss = confidence_interval(comparison.other.values("loss").values()).mean
            if math.isfinite(loss):
                fit = comparison.pair.other
                bounds[label].append((value, max_logit_bound(fit.length, fit.span, loss)))
        ends = [
            f"{name} from {number(points[0][1].mean)} to {number(points[-1][1].mean)}"
            for name, points in panels[label].items()
            if len(points) > 1
        ]
        if ends:
            texts.append(f"With {label} from {values[0]:g} to {values[-1]:g}: {', '.join(ends)}.")
    base = illustrated_pair(scale).local
    text = (
        f"The largest logit with l' = {base.span}, w = {base.window}, else n = {base.length}, d = "
        f"{base.head_dim}, σ = {base.sigma:g}. {' '.join(texts)} Best rates differ, and a higher rate may "
        "make larger logits: the last two columns are of one rate and the first seed."
    )
    rate = f"rate {rate_of(COMMON_RUNG):g}"
    header = ("largest logit", "global", "local", f"global, {rate}", f"local, {rate}")
    caption = (
        "At each arm's best rate, means with 95 % intervals. Grey: what global attention's logits must reach "
        "at least for the loss that it reached (below)."
    )
    file = draw_growth(panels, bounds, folder / "growth.png")
    return Section(
        "Growth of the largest logit", [text], table=Table(header, rows), figures=[Figure(file, caption)]
    )


def controls_section(scale: Scale, seeds: Sequence[int], results: Results) -> Section:
    """ALiBi, equal freedom, a start from the local fit, and targets without a band."""
    base = illustrated_pair(scale).local
    text = (
        f"Is it the window, or what comes with it? Global attention with ALiBi (slope {ALIBI_SLOPE:g}) is "
        f"told to look near; with d = {equal_freedom_head_dim(base)} it has as many parameters per score as "
        "local attention; from the local fit it starts where local attention ended. With targets anywhere "
        "instead of in a band, local attention must lose: it cannot see most of them."
    )
    found = [compare(pair, seeds, results) for pair in pairs(scale) if pair.topic == "control"]
    stayed = [comparison for comparison in found if comparison and comparison.pair.other.start_window]
    texts = [text]
    for comparison in stayed:
        results_of = list(comparison.other.by_seed.values())
        started = [
            average_text([result["start"][name] for result in results_of]) for name in ("loss", "max_logit")
        ]
        seen = [average_text([result[name][0] for result in results_of]) for name in ("losses", "max_logits")]
        texts.append(
            f"The local fit had loss {started[0]} and largest logit {started[1]} in its window. Seen by "
            f"global attention, it has {seen[0]} and {seen[1]}; global attention went on from there to "
            f"{mean_text(comparison.other, 'loss')} and {mean_text(comparison.other, 'max_logit')}."
        )
    return pairs_section("Controls", ("control", "shuffled"), scale, seeds, results, *texts)


def pairs_section(
    heading: str, topics: Sequence[Topic], scale: Scale, seeds: Sequence[int], results: Results, *texts: str
) -> Section:
    """A row per pair of these topics."""
    rows = []
    for pair in pairs(scale):
        comparison = compare(pair, seeds, results) if pair.topic in topics else None
        if comparison is None:
            continue
        other, local = comparison.other, comparison.local
        rows.append(
            (
                pair.label, mean_text(other, "loss"), mean_text(local, "loss"),
                ratio_text(comparison.log_ratio("loss")),
                mean_text(other, "max_logit"), mean_text(local, "max_logit"),
                ratio_text(comparison.log_ratio("max_logit")),
                ratio_text(comparison.log_ratio("row_range")),
            )
        )  # fmt: skip
    header = (
        "", "loss, global", "local", "local / global", "largest logit, global", "local", "local / global",
        "row range, ratio",
    )  # fmt: skip
    return Section(heading, texts, table=Table(header, rows))


def theory_section(scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Section:
    """Rank of the target, and how large logits must be for a loss."""
    pair = illustrated_pair(scale)
    fit = pair.other
    target = make_target(fit, torch.Generator().manual_seed(seeds[0]))
    ranks = ", ".join(f"{numerical_rank(target, tolerance)} at {tolerance:g}" for tolerance in _TOLERANCES)
    text = (
        f"The target (n = {fit.length}, l' = {fit.span}, seed {seeds[0]}) has numerical rank {ranks} "
        "(singular values above that share of the largest), where the logits of global attention have rank "
        f"{fit.head_dim}. That is no proof that it cannot be drawn: softmax is not linear, and large logits "
        "buy rank."
    )
    derived = (
        "How large must they be? If all logits are within ± M, some probability falls outside the band "
        "whatever the rank: loss ≥ mean over rows of log(1 + (keys outside / l')·e^(−2M)), so M ≥ about "
        "½·log(n / (2·l'·loss)). With the target known the least loss for M can be computed exactly for any "
        f"rank. For rank {fit.head_dim} we have only fits that were held within M: a numerical upper bound, "
        "not the least loss. The last column is the loss of the global fit, which nothing held, when its "
        "logits had grown to M."
    )
    limits = SIZES[scale].logit_limits
    best: dict[float, float] = {}
    for trial in frontier_trials(scale, seeds[0]):
        loss = results.get(trial.key, {}).get("loss")
        if loss is not None:
            limit = trial.settings["logit_limit"]
            best[limit] = min(loss, best.get(limit, math.inf))
    exact = {limit: least_loss_within(target, limit) for limit in limits}
    paths: dict[str, Points] = {}
    comparison = compare(pair, seeds, results)
    if comparison is not None:
        for name, side in (
            ("global, step by step", comparison.other),
            ("local, step by step", comparison.local),
        ):
            first = next(iter(side.by_seed.values()))
            path = zip(first["max_logits"], first["losses"], strict=True)
            paths[name] = [(x, y) for x, y in path if x is not None and y is not None and y > 0]
    free = paths.get("global, step by step", ())
    rows = [
        (
            f"{limit:g}", number(loss_bound(fit.length, fit.span, limit)), number(exact[limit]),
            number(best[limit]) if limit in best else "not run",
            number(min((y for x, y in free if x <= limit), default=None)),
        )
        for limit in limits
    ]  # fmt: skip
    header = ("M", "bound", "least loss, any rank", f"held within M, rank {fit.head_dim}", "not held")
    largest = max([x for points in paths.values() for x, _ in points] + list(limits))
    at = [largest * (index + 1) / _BOUND_POINTS for index in range(_BOUND_POINTS)]
    bounds = {
        "global: bound, any target in the band": [(m, loss_bound(fit.length, fit.span, m)) for m in at],
        "global: least loss for this target, any rank": [(m, least_loss_within(target, m)) for m in at],
    }
    held = {f"global: best fit found within the limit, rank {fit.head_dim}": sorted(best.items())}
    file = draw_bounds(bounds, held, paths, folder / "bounds.png")
    caption = "Seed 0 at the best rates. Global attention can be nowhere below the dotted lines."
    return Section(
        "Theory: rank and logits", [text, derived], table=Table(header, rows), figures=[Figure(file, caption)]
    )


def method_section(scale: Scale, seeds: Sequence[int], results: Results) -> Section:
    """Rates and rules."""
    arms = {arm for pair in pairs(scale) for arm in (pair.local, pair.other)}
    at_edge = sorted(
        f"{name_of(arm)} ({rate_of(search.best):g})"
        for arm in arms
        for search in [sweep(arm, results, seeds[0])]
        if search.is_at_edge and search.best is not None
    )
    edge = f"{len(at_edge)} of {len(arms)}: {'; '.join(at_edge)}" if at_edge else "none"
    rows = [
        (
            comparison.pair.label,
            *(f"{rate_of(side.sweep.best or 0):g}" for side in (comparison.other, comparison.local)),
        )
        for pair in pairs(scale)
        for comparison in [compare(pair, seeds, results)]
        if comparison is not None
    ]
    text = (
        f"{SIZES[scale].steps:,} steps at a constant rate, {len(seeds)} seeds. One seed gives all arms the "
        "same target and the same initial queries and keys. Each arm has its own sweep of rates in steps of "
        "√10 on the first seed, extended where the best lies at an edge; of rates whose losses are alike the "
        "lowest counts as best. 95 % intervals are Student's, over paired seeds."
    )
    return Section(
        "How this was run",
        [text, f"Arms whose best rate is still at the edge of the sweep: {edge}."],
        table=Table(("best rate", "global or other", "local"), rows),
    )


def mean_text(side: Side, quantity: str) -> str:
    """The mean over seeds of a quantity of `Side.values`."""
    return number(confidence_interval(side.values(quantity).values()).mean)


def average_text(values: Sequence[float | None]) -> str:
    """The mean of values."""
    return number(confidence_interval(values).mean)


def ratio_text(interval: Interval) -> str:
    """A ratio with its interval, from that of its logarithm."""
    return interval_text(interval.exp())

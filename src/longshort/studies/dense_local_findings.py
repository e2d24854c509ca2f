"""What the study `dense-local` found, in words, tables and figures, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longshort.reporting.intervals import Interval, confidence_interval, log_prediction_interval
from longshort.reporting.page import Figure, Section, Table, number
from longshort.reporting.plots import Panel, draw_curves
from longshort.studies.dense_local_arms import (
    SIZES,
    Pair,
    illustrated_pair,
    illustration,
    name_of,
    pairs,
    sweep,
    trial_of,
)
from longshort.studies.dense_local_figures import (
    draw_grid,
    draw_heat_maps,
)
from longshort.studies.dense_local_sections import (
    average_text,
    controls_section,
    growth_section,
    mean_text,
    method_section,
    pairs_section,
    ratio_text,
    theory_section,
)
from longshort.studies.dense_local_task import HIDDEN_PROBABILITY, WINDOWS_PER_SPAN, Fit
from longshort.studies.dense_local_verdicts import (
    Side,
    compare,
    grid_comparisons,
    speaking,
    verdicts,
)
from longshort.studies.study import Findings, Results, Scale

_WINDOW_NAMES = dict(zip(WINDOWS_PER_SPAN, ("½·l'", "l'", "2·l'", "4·l'"), strict=True))


def find(scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
    """Judge the claims and draw the figures into a folder. What is not run yet is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        _drawn(scale, seeds, results, folder),
        _losses(scale, seeds, results, folder),
        _logits(scale, seeds, results, folder),
        growth_section(scale, seeds, results, folder),
        controls_section(scale, seeds, results),
        pairs_section(
            "Precisions and optimizers", ("precision",), scale, seeds, results,
            "Precision and optimizer change sizes. bf16 rounds queries and keys; bf16-flash also rounds the "
            "exponentials, as flash kernels do, which lets whole rows of logits drift, since softmax does "
            "not see what is common to a row: the row range tells how far apart the logits of a row are.",
        ),
        pairs_section(
            "Through a real attention layer", ("layer",), scale, seeds, results,
            "One attention layer of one head on new random tokens in each step, with learned, rotary and no "
            "positions, learns weighted means over the last l' tokens; the weights depend on both tokens. "
            "Its loss is the error's mean square over that of the wanted outputs, on unseen sequences.",
        ),
        theory_section(scale, seeds, results, folder),
        method_section(scale, seeds, results),
    ]  # fmt: skip
    return Findings(verdicts(scale, seeds, results), sections, _predictions(scale, seeds, results))


def _predictions(scale: Scale, seeds: Sequence[int], results: Results) -> dict[str, dict[str, Interval]]:
    """Of each arm at its best rate."""
    found = {}
    for comparison in (compare(pair, seeds, results) for pair in pairs(scale)):
        for side in () if comparison is None else (comparison.local, comparison.other):
            found[name_of(side.arm)] = {
                quantity: log_prediction_interval(side.values(quantity).values())
                for quantity in ("loss", "max_logit")
            }
    return found


def _drawn(scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Section:
    pair = illustrated_pair(scale)
    fit = pair.local
    scores = {"global": _scores(pair.other), "local": _scores(fit)}
    freedom = 2 * fit.length * fit.head_dim
    text = (
        f"Of n = {fit.length} tokens, each depends on its last l' = {fit.span}. Queries and keys of width "
        f"d = {fit.head_dim} are {freedom:,} numbers, with which global attention draws {scores['global']:,} "
        f"scores and local attention (w = {fit.window}) {scores['local']:,}: "
        f"{freedom / scores['global']:.2g} and {freedom / scores['local']:.2g} numbers per score."
    )
    crops = {}
    for name, arm in (("global", pair.other), ("local", fit)):
        best = sweep(arm, results, seeds[0]).best
        if best is not None:
            crops[name] = results.get(trial_of(illustration(arm), best, seeds[0]).key)
    figures = []
    if all(crops.get(name) for name in scores):
        matrices = {"Target": crops["global"]["target"]}
        matrices |= {f"{name.capitalize()} fit": crops[name]["fit"] for name in scores}
        first = fit.length - len(matrices["Target"])
        file = draw_heat_maps(matrices, first, folder / "heatmaps.png")
        figures.append(
            Figure(
                file,
                "The last queries and keys of the target and of both fits (first seed). What global "
                "attention leaves outside the band is its error; local attention cannot put anything outside "
                "its window.",
            )
        )
    return Section("Target and fits (F2a,b)", [text], figures=figures)


def _losses(scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Section:
    rows, slower = [], 0
    ratios: list[Interval] = []
    for best, lower in zip(*(grid_comparisons(scale, seeds, results, rung) for rung in (0, 1)), strict=True):
        if best is None:
            continue
        ratio = best.log_ratio("loss")
        if _reaches(best.pair):
            ratios.append(ratio)
            slower += (best.local.sweep.best or 0) < (best.other.sweep.best or 0)
        rows.append(
            (
                best.pair.label, mean_text(best.other, "loss"), mean_text(best.local, "loss"),
                _least(best.local),
                ratio_text(ratio), "" if lower is None else ratio_text(lower.log_ratio("loss")),
            )
        )  # fmt: skip
    header = ("", "global", "local", "window allows", "local / global", "at lower rates")
    texts = []
    if ratios:
        below, above = speaking(ratios)
        texts.append(
            "Where the window holds the whole dependency (w ≥ l'), local attention's loss is lower in "
            f"{below} of {len(ratios)} combinations and higher in {above}, at each arm's best rate. At w < "
            "l' local attention cannot reach the target: the third column is the least that its window "
            "allows. How large that is, is our convention: a hidden key counts as if it had probability "
            f"{HIDDEN_PROBABILITY:g}, where KL would be infinite."
        )
        texts.append(
            f"In {slower} of these {len(ratios)} local attention's best rate is the lower one. Its next "
            f"lower rate is then lower still, and {SIZES[scale].steps:,} steps may no longer suffice: the "
            "last column compares how far each arm has come, not where it ends."
        )
    file = draw_curves(_panels(scale, seeds, results, "losses"), folder / "loss.png", height=3.2)
    return Section(
        "Training loss (F2c)",
        texts,
        table=Table(header, rows),
        figures=[
            Figure(file, "Loss (KL, nats) by step at each arm's best rate; faint lines are seeds."),
            Figure(
                draw_grid(_grid_tables(scale, seeds, results), folder / "grid.png"),
                "Local over global at the best rates, with 95 % intervals over paired seeds: below 1 speaks "
                "for the claims. Bold: the interval excludes 1.",
            ),
        ],
    )


def _logits(scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Section:
    rows = []
    ratios: list[Interval] = []
    for best, lower in zip(*(grid_comparisons(scale, seeds, results, rung) for rung in (0, 1)), strict=True):
        if best is None:
            continue
        window = best.pair.local.window
        assert window is not None
        ratios.append(best.log_ratio("max_logit"))
        rows.append(
            (
                best.pair.label, mean_text(best.other, "max_logit"),
                number(confidence_interval(best.other.in_band(window).values()).mean),
                mean_text(best.local, "max_logit"), ratio_text(ratios[-1]),
                "" if lower is None else ratio_text(lower.log_ratio("max_logit")),
                ratio_text(best.log_ratio("row_range")),
            )
        )  # fmt: skip
    header = (
        "", "global", "global, in the window", "local", "local / global", "at lower rates",
        "row range, ratio",
    )  # fmt: skip
    texts = []
    if ratios:
        below, above = speaking(ratios)
        texts.append(
            f"Local attention's largest logit is smaller in {below} of {len(ratios)} combinations and larger "
            f"in {above}, at each arm's best rate. The second column is of global attention over the pairs "
            "that local attention sees too. The row range is the largest difference of two logits of one "
            "query: softmax sees only that."
        )
    file = draw_curves(_panels(scale, seeds, results, "max_logits"), folder / "logits.png", height=3.2)
    caption = "Largest |scale·q·k| over visible pairs by step at each arm's best rate; faint lines are seeds."
    return Section("Largest logit (F2d)", texts, table=Table(header, rows), figures=[Figure(file, caption)])


def _panels(scale: Scale, seeds: Sequence[int], results: Results, quantity: str) -> list[Panel]:
    """One per l'/d of the grid, and one of the controls."""
    panels: dict[str, dict[str, list[list[tuple[float, float | None]]]]] = {}
    illustrated = illustrated_pair(scale)
    for pair in (*pairs(scale), illustrated):
        comparison = compare(pair, seeds, results)
        if comparison is None or (pair.topic not in ("grid", "control") and pair != illustrated):
            continue
        assert pair.local.window is not None
        if pair.topic == "grid":
            title, local = pair.label.split(",")[0], pair.local.window / pair.local.span
        else:
            title, local = f"Controls, n = {pair.local.length}", 2
        curves = panels.setdefault(title, {})
        curves.setdefault(pair.other_name, _curves(comparison.other, quantity))
        name = f"local, w = {_WINDOW_NAMES[local]}"
        curves.setdefault(name, _curves(comparison.local, quantity))
    label = {"losses": "loss (nats)", "max_logits": "largest |scale · q·k|"}[quantity]
    return [Panel(title, "step", label, curves) for title, curves in panels.items()] or [
        Panel("", "step", label, {})
    ]


def _curves(side: Side, quantity: str) -> list[list[tuple[float, float | None]]]:
    return [list(zip(result["steps"], result[quantity], strict=True)) for result in side.by_seed.values()]


def _grid_tables(
    scale: Scale, seeds: Sequence[int], results: Results
) -> dict[str, dict[tuple[str, str], Interval | None]]:
    grid = [pair for pair in pairs(scale) if pair.topic == "grid"]
    found = grid_comparisons(scale, seeds, results)
    tables: dict[str, dict[tuple[str, str], Interval | None]] = {}
    for title, quantity in (("Final loss", "loss"), ("Largest logit", "max_logit")):
        tables[title] = {
            (_value(row), _value(column)): cell and cell.log_ratio(quantity)
            for pair, cell in zip(grid, found, strict=True)
            for row, column in [pair.label.split(", ")]
        }
    return tables


def _value(label: str) -> str:
    return label.split(" = ")[1]


def _reaches(pair: Pair) -> bool:
    return pair.local.window is None or pair.local.window >= pair.local.span


def _scores(fit: Fit) -> int:
    reach = fit.window or fit.length
    return sum(min(position + 1, reach) for position in range(fit.length))


def _least(side: Side) -> str:
    return average_text([result["least_loss"] for result in side.by_seed.values()])

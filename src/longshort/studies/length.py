"""Study `length` (figures 3 and 4): do MHSA's logits grow with the sequence length, and LS-attention's
less?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longshort.reporting.intervals import (
    Interval,
    confidence_interval,
    log_or_none,
    slope_interval,
)
from longshort.reporting.page import Figure, Section, Table
from longshort.reporting.plots import Panel, draw_curves, draw_points
from longshort.studies.comparison import (
    PREDICTED,
    RATES,
    Rate,
    Trained,
    difference_text,
    interval_text,
    judge_below,
    log_ratio,
    loss_difference,
    loss_difference_at_equal_flops,
    predict,
    rate_cell,
    spread_text,
    trained_arm,
    without_doubles,
)
from longshort.studies.language import Arm, Setting, Sweep, main_trials, sweep
from longshort.studies.language_run import LanguageStudy
from longshort.studies.settings import LS, LS_ROPE, MHSA, MHSA_ROPE, paper_base, tiny
from longshort.studies.study import Claim, Findings, Outcome, Plan, Results, Scale, Trial, Verdict, weaker

TOKENS, SEQUENCES = "equal tokens a step", "equal sequences a step"
"""Budgets: with equal sequences every learned position is trained as often, whatever the length."""

GROWTH = Claim(
    "F3",
    "With MHSA instability and logit explosion appear at longer sequence lengths.",
    "MHSA's largest logit does not grow with the sequence length, or shrinks.",
    "The 95 % interval, over seeds, of the slope of log largest logit (last tenth of the training) over log "
    "n. Shown: above 0 at equal tokens a step and at equal sequences a step. Partly: above 0 in one of the "
    "two. Contradicted: below 0 in both. It must hold at the best rates and at the next lower ones.",
)
MITIGATION = Claim(
    "F4: each length",
    "LS-attention mitigates logit explosion and instability at each length.",
    "At some length LS's largest logit is as large as MHSA's, or LS diverges more often.",
    "95 % intervals of LS/MHSA of the largest logit, paired over seeds, at equal tokens a step. Shown: below "
    "1 at every length, and LS diverges at no length more often than MHSA. Partly: below 1 at more than half "
    "of the lengths. Contradicted: above 1 at more than half of them. It must hold at the best rates and at "
    "the next lower ones.",
)


@dataclass(frozen=True)
class _Scale:
    """`setting` is at the reference length, where rates are swept, unless every length has its own sweep."""

    setting: Setting
    lengths: Sequence[int]
    seeds: int
    sequences: int
    own_sweeps: bool = False
    controls: Sequence[Arm] = ()


_SCALES: Mapping[Scale, _Scale] = {
    "smoke": _Scale(replace(tiny(64, batch=2, steps=12), rates=(1e-2,)), (32, 64), seeds=2, sequences=1),
    "laptop": _Scale(tiny(512, batch=4, steps=2000), (256, 512, 1024), seeds=3, sequences=1),
    "overnight": _Scale(
        tiny(512, batch=8, steps=2500),
        (256, 512, 1024, 2048, 4096),
        seeds=5,
        sequences=1,
        own_sweeps=True,
        controls=(MHSA_ROPE, LS_ROPE),
    ),
    "paper": _Scale(paper_base(2048), (512, 1024, 2048, 4096, 8192), seeds=3, sequences=64),
}


class Length(LanguageStudy):
    """MHSA and LS-attention at growing sequence lengths, in two token budgets."""

    name = "length"
    title = "Sequence length (figures 3 and 4)"
    claims = (GROWTH, MITIGATION)

    def default_seeds(self, scale: Scale) -> int:
        return _SCALES[scale].seeds

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        chosen = _SCALES[scale]
        trials: list[Trial] = []
        later = 0.0
        for cell in _cells(chosen):
            found = _sweep(chosen, cell, results, seeds[0])
            trials += found.trials
            following = main_trials(cell.setting, cell.arm, found, seeds)
            if found.is_done:
                trials += following
            else:
                later += sum(trial.work for trial in following if trial.seed != seeds[0])
        return Plan(without_doubles(trials), later)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        chosen = _SCALES[scale]
        found = _found(chosen, seeds, results)
        is_done = len(found) == len(_cells(chosen))
        verdicts = [
            judge(found) if is_done else Verdict(claim, Outcome.NOT_MEASURED, "The trials are not done.")
            for claim, judge in ((GROWTH, _judge_growth), (MITIGATION, _judge_mitigation))
        ]
        predictions = {
            f"{row.cell.arm.name}, {row.cell.budget}, n = {row.cell.length}": {
                name: predict(name, row.trained.values(name)) for name in PREDICTED
            }
            for row in found
        }
        return Findings(verdicts, _sections(chosen, found, folder), predictions)


@dataclass(frozen=True)
class _Cell:
    arm: Arm
    budget: str
    length: int
    setting: Setting


def _cells(chosen: _Scale) -> list[_Cell]:
    """MHSA in both budgets, the others at equal tokens a step."""
    cells = []
    for arm in (MHSA, LS, *chosen.controls):
        for budget in (TOKENS, SEQUENCES) if arm.name.startswith("MHSA") else (TOKENS,):
            cells += [
                _Cell(arm, budget, length, _at_length(chosen, budget, length)) for length in chosen.lengths
            ]
    return cells


def _at_length(chosen: _Scale, budget: str, length: int) -> Setting:
    train: dict[str, Any] = dict(chosen.setting.train)
    tokens = train["batch_size"] * train["sequence_length"]
    validation_tokens = train["validation_windows"] * train["sequence_length"]
    train["sequence_length"] = length
    train["batch_size"] = tokens // length if budget == TOKENS else chosen.sequences
    train["validation_windows"] = max(1, validation_tokens // length)
    if "micro_batch_size" in train:
        train["micro_batch_size"] = min(train["batch_size"], max(1, 16_384 // length))
    return replace(chosen.setting, train=train)


def _sweep(chosen: _Scale, cell: _Cell, results: Results, seed: int) -> Sweep:
    return sweep(cell.setting if chosen.own_sweeps else chosen.setting, cell.arm, results, seed)


@dataclass(frozen=True)
class _Found:
    cell: _Cell
    trained: Trained


def _found(chosen: _Scale, seeds: Sequence[int], results: Results) -> list[_Found]:
    """The cells whose trials are all done."""
    found = []
    for cell in _cells(chosen):
        rates = _sweep(chosen, cell, results, seeds[0])
        trained = trained_arm(cell.setting, cell.arm, rates, seeds, results)
        if trained is not None:
            found.append(_Found(cell, trained))
    return found


def _series(found: Sequence[_Found], arm: str, budget: str) -> list[_Found]:
    return [row for row in found if row.cell.arm.name == arm and row.cell.budget == budget]


def _slope(rows: Sequence[_Found], name: str, rate: Rate) -> Interval:
    """Of log value over log length, over seeds."""
    curves = [
        [(math.log(row.cell.length), log_or_none(row.trained.values(name, rate)[seed])) for row in rows]
        for seed in rows[0].trained.results[rate]
    ]
    return slope_interval(curves)


def _judge_growth(found: Sequence[_Found]) -> Verdict:
    slopes = {
        (budget, rate): _slope(_series(found, MHSA.name, budget), "max_logit", rate)
        for budget in (TOKENS, SEQUENCES)
        for rate in RATES
    }

    def outcome(rate: Rate) -> Outcome:
        both = [slopes[budget, rate] for budget in (TOKENS, SEQUENCES)]
        above = [interval.low > 0 for interval in both]
        if all(interval.high < 0 for interval in both):
            return Outcome.CONTRADICTED
        return Outcome.SHOWN if all(above) else Outcome.PARTLY if any(above) else Outcome.NOT_SHOWN

    texts = [
        f"{budget}: {difference_text(slopes[budget, 'best'])} at the best rate, "
        f"{difference_text(slopes[budget, 'lower'])} at the next lower one"
        for budget in (TOKENS, SEQUENCES)
    ]
    ls = _slope(_series(found, LS.name, TOKENS), "max_logit", "best")
    in_band = [
        f"{difference_text(_slope(_series(found, MHSA.name, budget), 'max_logit_in_band', 'best'))} "
        f"({budget})"
        for budget in (TOKENS, SEQUENCES)
    ]
    losses = [
        f"{row.cell.length}: {confidence_interval(row.trained.values('validation_loss').values()).mean:.2f}"
        for row in _series(found, MHSA.name, TOKENS)
    ]
    return Verdict(
        GROWTH,
        weaker(outcome("best"), outcome("lower")),
        f"Slope of MHSA's log largest logit over log n, {'; '.join(texts)}. Inside the window alone, over "
        f"the same number of pairs per query, at the best rate: {'; '.join(in_band)}. LS, {TOKENS}: "
        f"{difference_text(ls)}. MHSA's validation loss by n, {TOKENS}: {', '.join(losses)} nats per token.",
    )


def _judge_mitigation(found: Sequence[_Found]) -> Verdict:
    pairs = list(zip(_series(found, MHSA.name, TOKENS), _series(found, LS.name, TOKENS), strict=True))
    arms = [(mhsa.trained, ls.trained) for mhsa, ls in pairs]
    outcomes = [_mitigation_outcome(arms, rate) for rate in RATES]
    ratios = [
        f"n = {mhsa.cell.length}: {interval_text(log_ratio(ls.trained, mhsa.trained, 'max_logit').exp())}"
        for mhsa, ls in pairs
    ]
    losses = [loss_difference(ls.trained, mhsa.trained) for mhsa, ls in pairs]
    at_flops = [loss_difference_at_equal_flops(ls.trained, mhsa.trained) for mhsa, ls in pairs]
    return Verdict(
        MITIGATION,
        weaker(*outcomes),
        f"LS/MHSA of the largest logit at the best rates: {'; '.join(ratios)}. Validation loss, LS − MHSA: "
        f"{'; '.join(map(difference_text, losses))} nats per token at equal steps, "
        f"{'; '.join(map(difference_text, at_flops))} at equal FLOPs.",
    )


def _mitigation_outcome(pairs: Sequence[tuple[Trained, Trained]], rate: Rate) -> Outcome:
    outcomes = [judge_below(log_ratio(ls, mhsa, "max_logit", rate).exp(), 1.0, 1.0) for mhsa, ls in pairs]
    shown, contradicted = outcomes.count(Outcome.SHOWN), outcomes.count(Outcome.CONTRADICTED)
    if shown == len(pairs) and all(ls.diverged(rate) <= mhsa.diverged(rate) for mhsa, ls in pairs):
        return Outcome.SHOWN
    if 2 * shown > len(pairs):
        return Outcome.PARTLY
    return Outcome.CONTRADICTED if 2 * contradicted > len(pairs) else Outcome.NOT_SHOWN


def _sections(chosen: _Scale, found: Sequence[_Found], folder: Path) -> list[Section]:
    if not found:
        return []
    lines: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for title, name in (("Largest logit", "max_logit"), ("Validation loss", "validation_loss")):
        lines[title] = {}
        for row in found:
            label = f"{row.cell.arm.name}, {row.cell.budget}"
            point = (float(row.cell.length), confidence_interval(row.trained.values(name).values()))
            lines[title].setdefault(label, []).append(point)
    curves = [
        Panel(
            f"{arm.name}, {TOKENS}", "step", "largest |scale · q·k|",
            {
                f"n = {row.cell.length}": row.trained.curves("max_logit")
                for row in _series(found, arm.name, TOKENS)
            },
        )
        for arm in (MHSA, LS)
    ]  # fmt: skip
    header = ("arm and budget", "n", "rate", "validation loss", "largest logit", "in window", "row range")
    table = Table(
        (*header, "diverged"),
        [
            (
                f"{row.cell.arm.name}, {row.cell.budget}",
                f"{row.cell.length:,}",
                rate_cell(row.trained.sweep),
                *(spread_text(name, row.trained.values(name)) for name in PREDICTED),
                f"{row.trained.diverged()} of {len(row.trained.results['best'])}",
            )
            for row in found
        ],
    )
    swept = "each length has its own sweep" if chosen.own_sweeps else (
        f"rates are swept at n = {chosen.setting.train['sequence_length']} and used at every length"
    )  # fmt: skip
    text = f"{chosen.setting.description} Here n varies; {swept}."
    labels = ("largest |scale · q·k|", "nats per token")
    return [
        Section(
            "By sequence length",
            [text],
            table=table,
            figures=[
                Figure(
                    draw_points(
                        lines,
                        folder / "length.png",
                        "sequence length (tokens)",
                        labels,
                    ),
                    "Left: the largest attention logit of the last tenth of the training. Right: validation "
                    "loss in nats per token. Means and 95 % confidence intervals over seeds, at the best "
                    "rates.",
                ),
                Figure(
                    draw_curves(curves, folder / "length_curves.png"),
                    "Largest logit by step at each length; thick: mean over seeds.",
                ),
            ],
        )
    ]

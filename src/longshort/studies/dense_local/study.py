"""The study `dense-local`, the paper's figure 2: global and local attention fit a dense random band.

Trials are single fits. The plan is every arm's sweep, then every arm on all seeds at its best rate and, if
verdicts depend on it, at the next lower one; then the fits that are drawn, and those with limited logits.
Where verdicts depend on them, both sides have the rates of the global one and are trained to a plateau.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longshort.reporting.intervals import Interval, log_prediction_interval
from longshort.studies.dense_local.arms import (
    SIZES,
    MeasuredPair,
    Pair,
    arm_of,
    frontier_trials,
    grid_ratios,
    illustrated_pair,
    illustration,
    measure_pairs,
    pairs,
    speaking,
)
from longshort.studies.dense_local.findings import sections
from longshort.studies.dense_local.layer import run_layer_fit
from longshort.studies.dense_local.task import LOSS_FLOOR, PLATEAU_FALL, Fit, run_fit
from longshort.studies.framework.comparison import rate_text, weaker
from longshort.studies.framework.study import (
    Claim,
    Findings,
    Outcome,
    Plan,
    Results,
    Scale,
    Study,
    Trial,
    Verdict,
    Workplace,
    unique,
)
from longshort.studies.framework.sweep import RATES, plan_arms, sweep

_RULE = (
    "In each combination of l'/d (½, 1, 4) and w/l' (1, 2, 4) the 95 % interval over paired seeds of the log "
    "of {quantity}, local over global, speaks for the claim if it lies below 0, against it if above 0. Both "
    "sides have equal rates: the one that is best for the global side, and the next lower one. A fit is "
    "trained at a constant rate to a plateau, where the geometric mean of its loss over the last third of "
    f"its steps is less than {PLATEAU_FALL * 100:g} % below that over the third before; then the rate falls "
    "to 0. Shown: for it in all combinations. Contradicted: against it in more than half. Partly shown: for "
    "it in at least half, and not contradicted. Else not shown. The weaker outcome of both rates counts. "
    "Open while a fit has not reached a plateau in the steps that it had. Windows narrower than the "
    "dependency (w < l') cannot reach the target; they are shown apart and do not count."
)

CLAIMS = (
    Claim(
        "F2a,b",
        "Global attention draws O(n²) scores from O(n·d) degrees of freedom, local attention O(n·l') scores.",
        "None: it is counting.",
        "Illustrated: target and fits are drawn from measured numbers; there is no verdict.",
        paper="a diagram",
    ),
    Claim(
        "F2c",
        "On a dense local dependency local attention reaches a lower training loss than global attention.",
        "Global attention reaches as low a loss, or a lower one, with other spans or windows than "
        "l' = d = w, where local attention wins by counting alone.",
        _RULE.format(quantity=f"final losses (at least {LOSS_FLOOR:g} nats, fp32's noise)"),
        paper="lower, at l' = d = w",
    ),
    Claim(
        "F2d",
        "On a dense local dependency local attention resists the explosion of logits.",
        "Local attention's largest logit grows as large as global attention's.",
        _RULE.format(quantity="largest logits at the end"),
        paper="smaller, at l' = d = w",
    ),
)


class DenseLocal(Study):
    """A dense random band, fitted by global and by local attention (figure 2)."""

    name = "dense-local"
    title = "Dense local dependencies (figure 2)"
    claims = CLAIMS
    scales = SIZES

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        on_grid = _fits(pair for pair in pairs(scale) if pair.topic == "grid")
        others = [fit for fit in _fits(pairs(scale)) if fit not in on_grid]
        grid = plan_arms(map(arm_of, on_grid), seeds, results)
        rest = plan_arms(map(arm_of, others), seeds, results, ("best",))
        trials = [*grid.trials, *rest.trials]
        later_work = grid.later_work + rest.later_work
        for fit in illustrated_pair(scale).fits:
            found, drawn = sweep(arm_of(fit), results, seeds[0]), illustration(fit)
            if found.is_done:
                trials.append(drawn.trial(found.best, seeds[0]))
            else:
                later_work += found.trials[0].work
        return Plan(unique([*trials, *frontier_trials(scale, seeds[0])], keep="first"), later_work)

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        fit = Fit(**trial.settings)
        run = run_fit if fit.form == "free" else run_layer_fit
        return run(fit, str(workplace.torch_device), workplace.report_progress)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        found = measure_pairs(scale, seeds, results)
        predictions = {
            side.arm.name: {
                quantity: log_prediction_interval(side.values(quantity).values())
                for quantity in ("loss", "max_logit")
            }
            for measured in found.values()
            for side in (measured.local, measured.other)
        }
        drawn = sections(scale, seeds, results, found, folder)
        sizes = SIZES[scale]
        tested = f"n = {sizes.grid_length:,}, head_dim {sizes.head_dim}, {len(seeds)} seeds"
        return Findings(verdicts(scale, found), drawn, predictions, tested)


def _fits(chosen: Iterable[Pair]) -> list[Fit]:
    return list(dict.fromkeys(fit for pair in chosen for fit in pair.fits))


def verdicts(scale: Scale, found: Mapping[Pair, MeasuredPair]) -> list[Verdict]:
    """Judge each claim by its rule."""
    drawn, losses, logits = CLAIMS
    return [
        Verdict(drawn, Outcome.ILLUSTRATED, "Target, global fit and local fit are drawn below."),
        _judge(losses, scale, found, "loss", "loss"),
        _judge(logits, scale, found, "max_logit", "largest logit"),
    ]


def _judge(
    claim: Claim, scale: Scale, found: Mapping[Pair, MeasuredPair], quantity: str, word: str
) -> Verdict:
    late, fits = off_plateau(found)
    if late:
        return Verdict(
            claim,
            Outcome.NOT_REACHED,
            f"{len(late)} of {fits} fits did not reach a plateau in the steps that they had: "
            f"{'; '.join(dict.fromkeys(late))}.",
            here=f"{len(late)} of {fits} fits did not reach a plateau",
        )

    ratios = {rate: list(grid_ratios(scale, found, quantity, rate).values()) for rate in RATES}
    texts = {}
    for rate, intervals in ratios.items():
        speak_for, against = speaking([interval for interval in intervals if interval is not None])
        texts[rate] = f"lower in {speak_for} and higher in {against}"
    words = {"best": "the global side's best", "lower": "the next lower"}
    missing = {rate: intervals.count(None) for rate, intervals in ratios.items()}
    told = (
        f"at {words[rate]} rates {text}" + (f", {missing[rate]} not run" if missing[rate] else "")
        for rate, text in texts.items()
    )
    count = len(ratios["best"])
    return Verdict(
        claim,
        weaker(*map(outcome, ratios.values())),
        f"Local attention's {word}, of {count} combinations: {'; '.join(told)}.",
        here=f"{texts['best']} of {count} combinations",
    )


def off_plateau(found: Mapping[Pair, MeasuredPair]) -> tuple[list[str], int]:
    """List the fits that decide the verdicts and neither diverged nor reached a plateau, by name, and count
    all that decide them."""
    sides = {
        side.arm.name: side
        for pair, measured in found.items()
        if pair.topic == "grid"
        for side in (measured.local, measured.other)
    }
    fits = [
        (f"{name} at {rate_text(side.sweep.rate(rate))}", result)
        for name, side in sides.items()
        for rate in side.by_rate
        for result in side.results(rate)
    ]
    late = [name for name, result in fits if result["loss"] is not None and result["plateau_at"] is None]
    return late, len(fits)


def outcome(intervals: Sequence[Interval | None]) -> Outcome:
    """Return the outcome by the log-ratios local / global of all combinations at one choice of rates."""
    known = [interval for interval in intervals if interval is not None]
    if not known or len(known) < len(intervals) or any(interval.count < 2 for interval in known):
        return Outcome.NOT_MEASURED
    speak_for, against = speaking(known)
    if speak_for == len(known):
        return Outcome.SHOWN
    if 2 * against > len(known):
        return Outcome.CONTRADICTED
    return Outcome.PARTLY if 2 * speak_for >= len(known) else Outcome.NOT_SHOWN

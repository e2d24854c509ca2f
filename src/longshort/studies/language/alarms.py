"""Evaluation of alarms: whether their scores tell runs that will diverge from sound ones, and how early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import Any

from scipy.stats import binomtest

from longshort.reporting.intervals import LEVEL, Interval
from longshort.reporting.page import Section, Table, number
from longshort.stability import ALARMS, Alarm
from longshort.stability.alarms import MEASUREMENTS, alarm_score
from longshort.studies.framework.comparison import interval_text
from longshort.studies.framework.study import Claim, Outcome, Verdict, not_measured

FALSE_ALARMS = 0.05
"""Share of sound runs in which an alarm may sound."""

LEAST_RUNS = 3
"""An alarm is judged from this many runs that diverged and as many sound ones."""

WARNING = Claim(
    "alarms",
    "A signal of single heads tells that a run will diverge before its loss does.",
    "No signal sounds in time in half of the runs that diverge.",
    "Signals: slope of the log row range, fall of the attention's entropy, fall of the spectral entropy of "
    "the update of W_Qᵀ·W_K; each the largest of all heads, every 10 steps after the warm-up, in which every "
    "run that begins to learn raises them. A run's score is its highest before the running loss began to be "
    "0.14 nats per byte too high, that of a sound run the highest over the same steps. A signal is "
    "useful if the lower end of its AUROC is above 0.5 (95 % for the three signals together, by Newcombe's "
    "method over runs) and if, at the threshold that at most 5 % of the sound runs exceed at any step, the "
    "median lead time of the runs that diverge is above 0 steps. Shown: "
    "one is useful. Contradicted: for each, the 95 % interval (exact, binomial) of the share of runs that "
    "diverge in which it sounds in time is below one half. Otherwise not shown. Not measured with fewer than "
    f"{LEAST_RUNS} runs of either kind.",
)


@dataclass(frozen=True)
class Run:
    """One alarm's scores of a run.

    Attributes:
        scores: pairs of step and score; None where there was none.
        onset: step from which its loss showed its divergence; None for a sound run.
        rate: its learning rate.
    """

    scores: Sequence[tuple[int, float | None]]
    onset: int | None
    rate: float

    def highest(self, before: float = math.inf) -> float:
        """Return the highest score before a step; −∞ if there is none."""
        known = (score for step, score in self.scores if step < before and score is not None)
        return max(known, default=-math.inf)


@dataclass(frozen=True)
class Evaluation:
    """What an alarm is worth.

    Attributes:
        auroc: the probability that a run that diverges has the higher score, compared with a sound one over
            the same steps, with its interval.
        auroc_at_equal_rates: the same over pairs of equal learning rate; None if there are none.
        threshold: score that at most `FALSE_ALARMS` of the sound runs exceed.
        leads: for each run that diverged the steps from the alarm to the onset; 0 where none came before.
    """

    auroc: Interval
    auroc_at_equal_rates: float | None
    threshold: float
    leads: Sequence[int]

    @property
    def in_time(self) -> int:
        """The number of runs that diverged with an alarm before."""
        return sum(lead > 0 for lead in self.leads)

    @property
    def is_useful(self) -> bool:
        """Whether it separates runs, and warns in time in the median."""
        return self.auroc.low > 0.5 and median(self.leads) > 0

    @property
    def is_late(self) -> bool:
        """Whether it is shown to warn in time in less than half of the runs."""
        share = binomtest(self.in_time, len(self.leads)).proportion_ci(LEVEL, method="exact")
        return share.high < 0.5

    @property
    def p_separating(self) -> float:
        """The two-sided p-value of an AUROC of 0.5, of this alarm alone."""
        sound = self.auroc.count - len(self.leads)
        deviation = _deviation(0.5, len(self.leads), sound)
        return 2 * NormalDist().cdf(-abs(self.auroc.mean - 0.5) / deviation)

    @property
    def p_late(self) -> float:
        """The two-sided p-value of a warning in time in half of the runs."""
        return float(binomtest(self.in_time, len(self.leads), 0.5).pvalue)


def alarm_series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Compute the scores of all alarms from lines of metrics: a list for each, beside the list "step"."""
    lines = list(lines)
    series: dict[str, list[Any]] = {"step": [line["step"] for line in lines]}
    for alarm in ALARMS:
        score = alarm_score(alarm)
        series[alarm] = [score.add(line["step"], line[MEASUREMENTS[alarm]]) for line in lines]
    return series


RatedResults = Sequence[tuple[float, Mapping[str, Any]]]
"""Pairs of learning rate and result of `train_language_model`, with `alarm_scores`."""


def runs_of(results: RatedResults, alarm: Alarm, after: int) -> list[Run]:
    """Read one alarm's scores after a step."""
    runs = []
    for rate, result in results:
        series = result["alarm_scores"]
        scores = zip(series["step"], series[alarm], strict=True)
        runs.append(Run([one for one in scores if one[0] > after], result["diverged_from"], rate))
    return runs


def evaluate(runs: Sequence[Run]) -> Evaluation:
    """Evaluate an alarm on runs, of which some diverged and some are sound."""
    diverged = [run for run in runs if run.onset is not None]
    sound = [run for run in runs if run.onset is None]
    wins = [
        (first.rate == second.rate, _win(first.highest(first.onset), second.highest(first.onset)))
        for first in diverged
        for second in sound
        if first.onset is not None
    ]
    at_equal_rates = [win for is_equal, win in wins if is_equal]
    limit = threshold(sound)
    return Evaluation(
        auroc_interval(fmean(win for _, win in wins), len(diverged), len(sound)),
        fmean(at_equal_rates) if at_equal_rates else None,
        limit,
        [lead_time(run, limit) for run in diverged],
    )


def _win(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def auroc_interval(
    auroc: float, positives: int, negatives: int, level: float = 1 - (1 - LEVEL) / len(ALARMS)
) -> Interval:
    """Compute the interval of an AUROC by Newcombe 2006 (method 5), which is not empty at 0 and 1 either.

    Args:
        auroc: the share of pairs in which the positive is higher, ties counted as half.
        positives, negatives: number of each.
        level: by default 95 % for all alarms together (Bonferroni).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)

    def lower(value: float) -> float:
        low, high = 0.0, value
        for _ in range(60):
            middle = (low + high) / 2
            is_outside = value - middle > z * _deviation(middle, positives, negatives)
            low, high = (middle, high) if is_outside else (low, middle)
        return low

    return Interval(auroc, lower(auroc), 1 - lower(1 - auroc), positives + negatives)


def _deviation(auroc: float, positives: int, negatives: int) -> float:
    """Compute the standard deviation of an estimated AUROC whose true value is `auroc`."""
    more = ((positives + negatives) / 2 - 1) * ((1 - auroc) / (2 - auroc) + auroc / (1 + auroc))
    return math.sqrt(auroc * (1 - auroc) * (1 + more) / (positives * negatives))


def threshold(sound: Sequence[Run], share: float = FALSE_ALARMS) -> float:
    """Return the lowest score that at most a share of the sound runs exceed."""
    highest = sorted((run.highest() for run in sound), reverse=True)
    return highest[math.floor(share * len(highest))]


def lead_time(run: Run, limit: float) -> int:
    """Return the steps from the first score above a limit to the onset; 0 if none is before it."""
    assert run.onset is not None
    sounded = (step for step, score in run.scores if score is not None and score > limit)
    return max(0, run.onset - next(sounded, run.onset))


def judge_alarms(results: RatedResults, after: int) -> Verdict:
    """Judge `WARNING` by the scores after a step, the end of the warm-up."""
    evaluations = _evaluations(results, after)
    if not evaluations:
        return not_measured(WARNING, f"Fewer than {LEAST_RUNS} runs diverged, or fewer than that did not.")
    useful: list[Alarm] = [alarm for alarm, found in evaluations.items() if found.is_useful]
    outcome = Outcome.SHOWN if useful else Outcome.NOT_SHOWN
    tested = [evaluations[alarm] for alarm in useful] or list(evaluations.values())
    p = min(1.0, len(ALARMS) * min(found.p_separating for found in tested))
    if not useful and all(found.is_late for found in evaluations.values()):
        outcome, p = Outcome.CONTRADICTED, max(found.p_late for found in evaluations.values())
    diverged = len(next(iter(evaluations.values())).leads)
    texts = [
        f"{alarm}: AUROC {interval_text(found.auroc)}, in time in {found.in_time} of {diverged} runs, median "
        f"lead {median(found.leads):g} steps"
        for alarm, found in evaluations.items()
    ]
    evidence = (
        f"Of {len(results)} runs {diverged} diverged. {'; '.join(texts)}. "
        f"Useful: {', '.join(useful) or 'none'}."
    )
    best = max(evaluations, key=lambda alarm: evaluations[alarm].auroc.mean)
    found = evaluations[best]
    here = f"{best}: AUROC {interval_text(found.auroc)}, median lead {median(found.leads):g} steps"
    return Verdict(WARNING, outcome, evidence, p, here)


def alarm_sections(results: RatedResults, after: int) -> list[Section]:
    """Make the section with a row per alarm, from the scores after a step; none if there are too few runs."""
    rows = [
        (
            alarm,
            interval_text(found.auroc),
            "–" if found.auroc_at_equal_rates is None else number(found.auroc_at_equal_rates),
            number(found.threshold),
            f"{found.in_time} of {len(found.leads)}",
            f"{median(found.leads):g}",
        )
        for alarm, found in _evaluations(results, after).items()
    ]
    if not rows:
        return []
    text = (
        "Runs that diverged against sound ones, at all learning rates, and at equal ones alone: a high rate "
        "may raise a score whether the run diverges or not. The threshold is set on these sound runs "
        "themselves; with fewer than 20 of them none may exceed it. Steps count to where the running loss "
        "began to be too high."
    )
    header = ("", "AUROC", "at equal rates", "threshold", "in time", "median lead (steps)")
    return [Section("Alarms", [text], table=Table(header, rows))]


def _evaluations(results: RatedResults, after: int) -> dict[Alarm, Evaluation]:
    """Evaluate all alarms; none if there are too few runs."""
    diverged = sum(result["diverged_from"] is not None for _, result in results)
    if min(diverged, len(results) - diverged) < LEAST_RUNS:
        return {}
    return {alarm: evaluate(runs_of(results, alarm, after)) for alarm in ALARMS}

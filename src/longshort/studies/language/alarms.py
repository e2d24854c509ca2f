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
from longshort.stability.alarms import ALARM_MEASUREMENTS, alarm_score
from longshort.studies.framework.comparison import interval_text
from longshort.studies.framework.study import Claim, Outcome, Verdict, not_measured

FALSE_ALARMS = 0.05
"""Share of sound runs in which an alarm may sound."""

LEAST_RUNS = 3
"""An alarm is evaluated from this many runs that diverged and as many sound ones."""

WARNING = Claim(
    "alarms",
    "A signal of single heads tells that a run will diverge before its loss does.",
    "No signal sounds in time in half of the runs that diverge.",
    "Signals: slope of the log row range, fall of the attention's entropy, fall of the spectral entropy of "
    "the update of W_Qᵀ·W_K; each the largest of all heads, every 10 steps after the warm-up, in which every "
    "run that begins to learn raises them. A run's score is its highest before the running loss began to be "
    "0.14 nats per byte too high, that of a sound run the highest over the same steps. Runs that neither "
    "diverge nor begin to learn are left out. Only runs of equal learning rate are compared, since a high "
    "rate alone raises scores; runs of all arms are. A signal is useful if the lower end of its AUROC is "
    "above 0.5 (95 % for the three signals together, by Newcombe's method over the runs at rates at which "
    "some diverge and others do not), also after Holm's correction over the study's claims, and if, at the "
    "threshold that at most 5 % of the sound runs of all rates exceed at any step, the median lead time of "
    "the runs that diverge is above 0 steps. Shown: one is useful. Contradicted: for each, the 95 % interval "
    "(exact, binomial) of the share of runs that diverge in which it sounds in time is below one half. "
    "Otherwise not shown. Not measured with fewer "
    f"than {LEAST_RUNS} runs of either kind at such rates.",
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
        auroc: the probability that a run that diverges has the higher score, compared with a sound one of
            the same learning rate over the same steps, with its interval; None if no rate has both.
        auroc_at_all_rates: the same over all pairs, without an interval.
        threshold: score that at most `FALSE_ALARMS` of the sound runs exceed.
        leads: for each run that diverged the steps from the alarm to the onset; 0 where none came before.
        p_separating: two-sided p-value of an AUROC of 0.5 at equal rates, of this alarm alone; 1 without one.
    """

    auroc: Interval | None
    auroc_at_all_rates: float
    threshold: float
    leads: Sequence[int]
    p_separating: float

    @property
    def in_time(self) -> int:
        """The number of runs that diverged with an alarm before."""
        return sum(lead > 0 for lead in self.leads)

    @property
    def is_useful(self) -> bool:
        """Whether it separates runs of equal rates, and warns in time in the median."""
        return self.auroc is not None and self.auroc.low > 0.5 and median(self.leads) > 0

    @property
    def is_late(self) -> bool:
        """Whether it is shown to warn in time in less than half of the runs."""
        share = binomtest(self.in_time, len(self.leads)).proportion_ci(LEVEL, method="exact")
        return share.high < 0.5

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
        series[alarm] = [score.add(line["step"], line[ALARM_MEASUREMENTS[alarm]]) for line in lines]
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
    auroc, p = None, 1.0
    if at_equal_rates:
        mean = fmean(at_equal_rates)
        counts = at_mixed_rates((run.rate, run.onset is not None) for run in runs)
        auroc = auroc_interval(mean, counts)
        p = 2 * NormalDist().cdf(-abs(mean - 0.5) / _deviation(0.5, counts))
    limit = threshold(sound)
    leads = [lead_time(run, limit) for run in diverged]
    return Evaluation(auroc, fmean(win for _, win in wins), limit, leads, p)


def at_mixed_rates(runs: Iterable[tuple[float, bool]]) -> list[tuple[int, int]]:
    """Count the runs that diverged, and the sound ones, at each learning rate that has both.

    Args:
        runs: the learning rate of each run, and whether it diverged.
    """
    kinds: dict[float, list[bool]] = {}
    for rate, has_diverged in runs:
        kinds.setdefault(rate, []).append(has_diverged)
    counts = [(sum(found), len(found) - sum(found)) for found in kinds.values()]
    return [(diverged, sound) for diverged, sound in counts if diverged and sound]


def _win(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def auroc_interval(
    auroc: float, counts: Sequence[tuple[int, int]], level: float = 1 - (1 - LEVEL) / len(ALARMS)
) -> Interval:
    """Compute the interval of an AUROC by Newcombe 2006 (method 5), which is not empty at 0 and 1 either.

    Args:
        auroc: the share of pairs within a group in which the positive is higher, ties counted as half.
        counts: the numbers of positives and negatives of each group.
        level: the level of the interval; by default 95 % for all alarms together (Bonferroni).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)

    def lower(value: float) -> float:
        low, high = 0.0, value
        for _ in range(60):
            middle = (low + high) / 2
            is_outside = value - middle > z * _deviation(middle, counts)
            low, high = (middle, high) if is_outside else (low, middle)
        return low

    return Interval(auroc, lower(auroc), 1 - lower(1 - auroc), sum(map(sum, counts)))


def _deviation(auroc: float, counts: Sequence[tuple[int, int]]) -> float:
    """Compute the standard deviation of an estimated AUROC whose true value is `auroc`, a mean over the pairs
    within each group."""
    growth = (1 - auroc) / (2 - auroc) + auroc / (1 + auroc)
    variance = sum(
        positives * negatives * auroc * (1 - auroc) * (1 + ((positives + negatives) / 2 - 1) * growth)
        for positives, negatives in counts
    )
    return math.sqrt(variance) / sum(positives * negatives for positives, negatives in counts)


def threshold(sound: Sequence[Run]) -> float:
    """Return the lowest score that at most a share `FALSE_ALARMS` of the sound runs exceed."""
    highest = sorted((run.highest() for run in sound), reverse=True)
    return highest[math.floor(FALSE_ALARMS * len(highest))]


def lead_time(run: Run, limit: float) -> int:
    """Return the steps from the first score above a limit to the onset; 0 if none is before it."""
    assert run.onset is not None
    sounded = (step for step, score in run.scores if score is not None and score > limit)
    return max(0, run.onset - next(sounded, run.onset))


def judge_alarms(results: RatedResults, after: int) -> Verdict:
    """Judge `WARNING`.

    Args:
        results: all runs that diverged or began to learn; none until all of them are done.
        after: step after which scores count, the end of the warm-up.
    """
    if not results:
        return not_measured(WARNING)
    counts = at_mixed_rates((rate, result["diverged_from"] is not None) for rate, result in results)
    mixed = [sum(group) for group in zip(*counts, strict=True)] or [0, 0]
    diverged = sum(result["diverged_from"] is not None for _, result in results)
    if min(mixed) < LEAST_RUNS:
        return not_measured(
            WARNING,
            f"{diverged} of {len(results)} runs that began to learn diverged; at rates at which some do and "
            f"others do not, {mixed[0]} diverged and {mixed[1]} did not. A comparison needs {LEAST_RUNS} of "
            "each.",
        )
    evaluations = _evaluations(results, after)
    useful: list[Alarm] = [alarm for alarm, found in evaluations.items() if found.is_useful]
    outcome = Outcome.SHOWN if useful else Outcome.NOT_SHOWN
    tested = [evaluations[alarm] for alarm in useful] or list(evaluations.values())
    p = min(1.0, len(ALARMS) * min(found.p_separating for found in tested))
    if not useful and all(found.is_late for found in evaluations.values()):
        outcome, p = Outcome.CONTRADICTED, max(found.p_late for found in evaluations.values())
    texts = [
        f"{alarm}: AUROC {_auroc_text(found)} at equal rates, {number(found.auroc_at_all_rates)} over all; "
        f"in time in {found.in_time} of {diverged} runs, median lead {median(found.leads):g} steps"
        for alarm, found in evaluations.items()
    ]
    evidence = (
        f"Of {len(results)} runs {diverged} diverged. {'; '.join(texts)}. "
        f"Useful: {', '.join(useful) or 'none'}."
    )
    best, found = max(evaluations.items(), key=lambda one: one[1].auroc.mean if one[1].auroc else 0.0)
    here = f"{best}: AUROC {_auroc_text(found)}, median lead {median(found.leads):g} steps"
    return Verdict(WARNING, outcome, evidence, p, here)


def alarm_sections(results: RatedResults, after: int) -> list[Section]:
    """Make the section with a row per alarm, from the scores after a step; none if there are too few runs."""
    rows = [
        (
            alarm,
            _auroc_text(found),
            number(found.auroc_at_all_rates),
            number(found.threshold),
            f"{found.in_time} of {len(found.leads)}",
            f"{median(found.leads):g}",
        )
        for alarm, found in _evaluations(results, after).items()
    ]
    if not rows:
        return []
    text = (
        "Runs that diverged against sound ones, at equal learning rates and at all: a high rate may raise a "
        "score whether the run diverges or not. The threshold is set on these sound runs themselves; with "
        "fewer than 20 of them none may exceed it. Steps count to where the running loss began to be too "
        "high."
    )
    header = ("", "AUROC at equal rates", "at all rates", "threshold", "in time", "median lead (steps)")
    return [Section("Alarms", [text], table=Table(header, rows))]


def _auroc_text(found: Evaluation) -> str:
    return "–" if found.auroc is None else interval_text(found.auroc)


def _evaluations(results: RatedResults, after: int) -> dict[Alarm, Evaluation]:
    """Evaluate all alarms; none if there are too few runs."""
    diverged = sum(result["diverged_from"] is not None for _, result in results)
    if min(diverged, len(results) - diverged) < LEAST_RUNS:
        return {}
    return {alarm: evaluate(runs_of(results, alarm, after)) for alarm in ALARMS}

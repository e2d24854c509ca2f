"""The evaluation of alarms, on planted scores."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from longshort.stability import ALARMS
from longshort.studies.language.alarms import (
    Run,
    alarm_sections,
    alarm_series,
    auroc_interval,
    evaluate,
    judge_alarms,
    lead_time,
    threshold,
)

STEPS = range(0, 1000, 10)


def run(onset: int | None = None, rise: int | None = None, base: float = 1.0, rate: float = 1e-2) -> Run:
    """A score that is `base`, and 10 more from the step `rise` on."""
    return Run([(step, base + 10 * (rise is not None and step >= rise)) for step in STEPS], onset, rate)


def test_a_perfect_alarm_has_the_lead_that_was_planted() -> None:
    found = evaluate([run(600, 400), run(500, 450), run(700, 310), *[run(base=b) for b in (1, 2, 3)]])
    assert found.auroc is not None and found.auroc.mean == 1.0
    assert found.threshold == 3.0
    assert found.leads == [200, 50, 390] and found.in_time == 3


def test_an_alarm_that_comes_with_the_loss_is_none() -> None:
    found = evaluate([run(600, 600), run(500, 540), run(700, 700), *[run() for _ in range(3)]])
    assert found.auroc is not None and found.auroc.mean == 0.5  # all scores before are alike
    assert found.leads == [0, 0, 0] and found.in_time == 0 and not found.is_useful


def test_sound_runs_count_over_the_same_steps_for_the_auroc_and_to_their_end_for_the_threshold() -> None:
    late = run(rise=800)  # a sound run whose score is high later
    found = evaluate([run(600, 400, base=1.5)] * 3 + [late] * 3)
    assert found.auroc is not None and found.auroc.mean == 1.0
    assert found.threshold == 11.0  # which those that diverge exceed from step 400 on, to 11.5
    assert found.leads == [200] * 3


def test_pairs_of_equal_rate_are_told_apart() -> None:
    """A score that is the learning rate's alone."""
    runs = [run(500, base=3.0, rate=3e-2) for _ in range(3)]
    runs += [run(base=1.0, rate=1e-2) for _ in range(6)] + [run(base=3.0, rate=3e-2) for _ in range(2)]
    found = evaluate(runs)
    assert found.auroc_at_all_rates == pytest.approx((6 + 2 * 0.5) / 8)
    assert found.auroc is not None and (found.auroc.mean, found.auroc.count) == (0.5, 5)
    alone = evaluate(runs[:-2])
    assert alone.auroc is None and not alone.is_useful and alone.p_separating == 1.0


def test_a_score_that_is_the_learning_rate_is_no_alarm() -> None:
    results = [(rate, result(500 if rate > 2e-2 else None)[1]) for rate in (1e-2, 3e-2) for _ in range(9)]
    for rate, one in results:
        one["alarm_scores"] |= {alarm: [rate] * len(STEPS) for alarm in ALARMS}
    apart = judge_alarms(results, 0)
    assert apart.outcome.value == "not measured at this scale"
    assert "9 of 18 runs" in apart.evidence and "0 diverged and 0 did not" in apart.evidence
    mixed = [*results, *[(3e-2, {**results[-1][1], "diverged_from": None}) for _ in range(9)]]
    assert judge_alarms(mixed, 0).outcome.value == "contradicted at this scale"
    (section,) = alarm_sections(results, 0)
    assert section.table is not None and section.table.rows[0][1:3] == ("–", "1")


def test_runs_without_a_score_before_their_onset_are_missed() -> None:
    short = Run([(0, None), (10, None), (20, 99.0)], 15, 1e-2)
    assert short.highest(15) == -math.inf and short.highest() == 99.0
    assert lead_time(short, 1.0) == 0
    found = evaluate([short] * 3 + [run()] * 3)
    assert found.auroc is not None and found.auroc.mean == 0.0


@pytest.mark.parametrize(("count", "allowed"), [(3, 0), (19, 0), (20, 1), (40, 2)])
def test_5_percent_of_sound_runs_may_exceed_the_threshold(count: int, allowed: int) -> None:
    sound = [run(base=float(base)) for base in range(count)]
    assert sum(one.highest() > threshold(sound) for one in sound) == allowed


def test_intervals_of_an_auroc() -> None:
    """Not empty at the ends, symmetrical, narrower with more runs."""
    intervals = [auroc_interval(1.0, [(count, count)], 0.95) for count in (3, 6, 20, 100)]
    assert intervals[0].low == pytest.approx(0.5, abs=0.01)  # as the exact test: 1 of 20 orders
    assert all(first.low < second.low for first, second in pairwise(intervals))
    assert all(interval.high == 1.0 for interval in intervals)
    mirrored = auroc_interval(0.2, [(5, 9)], 0.95), auroc_interval(0.8, [(5, 9)], 0.95)
    assert mirrored[0].low == pytest.approx(1 - mirrored[1].high)
    assert auroc_interval(0.8, [(9, 9)]).low < auroc_interval(0.8, [(9, 9)], 0.95).low < 0.8
    assert auroc_interval(0.8, [(4, 5), (1, 8)], 0.95).low < auroc_interval(0.8, [(5, 13)], 0.95).low


@pytest.mark.parametrize("counts", [[(8, 12)], [(4, 5), (5, 4)], [(2, 7), (7, 2)], [(1, 8), (8, 1)]])
def test_intervals_of_an_auroc_cover_the_truth(counts: list[tuple[int, int]]) -> None:
    """Scores in groups, normal with means 1 apart: an AUROC of Φ(1/√2)."""
    draw, truth = random.Random(0), 0.7602
    covered = 0
    for _ in range(400):
        wins = 0
        for positives, negatives in counts:
            positive = [draw.gauss(1, 1) for _ in range(positives)]
            negative = [draw.gauss(0, 1) for _ in range(negatives)]
            wins += sum(first > second for first in positive for second in negative)
        interval = auroc_interval(wins / sum(math.prod(group) for group in counts), counts, 0.95)
        covered += interval.low <= truth <= interval.high
    assert covered / 400 >= 0.92


def result(onset: int | None = None, **rises: int | None) -> tuple[float, dict]:
    scores = {
        alarm: [score for _, score in run(onset, rises.get(alarm.replace("-", "_"))).scores]
        for alarm in ALARMS
    }
    return 1e-2, {"diverged_from": onset, "alarm_scores": {"step": list(STEPS), **scores}}


def test_verdicts_on_planted_runs() -> None:
    sound = [result() for _ in range(8)]
    useful = judge_alarms([*[result(500, update=300) for _ in range(8)], *sound], 0)
    assert useful.outcome.value == "shown" and useful.evidence.endswith("Useful: update.")
    assert useful.p is not None and useful.p < 0.05
    assert "update: AUROC 1 [0.6" in useful.evidence and "median lead 200 steps" in useful.evidence
    useless = judge_alarms([*[result(500) for _ in range(8)], *sound], 0)
    assert useless.outcome.value == "contradicted at this scale"
    assert useless.p is not None and useless.p < 0.05
    few = judge_alarms([*[result(500, update=300) for _ in range(3)], *sound[:3]], 0)
    assert few.outcome.value == "not shown at this scale"
    half = [result(500, row_range=300) for _ in range(4)] + [result(500) for _ in range(4)]
    assert judge_alarms([*half, *sound], 0).outcome.value == "not shown at this scale"


@pytest.mark.parametrize(("diverged", "sound"), [(2, 9), (9, 2), (0, 9), (0, 0)])
def test_too_few_runs_are_no_measurement(diverged: int, sound: int) -> None:
    results = [result(500) for _ in range(diverged)] + [result() for _ in range(sound)]
    assert judge_alarms(results, 0).outcome.value == "not measured at this scale"
    assert alarm_sections(results, 0) == []


def test_scores_of_the_warm_up_do_not_count() -> None:
    """All runs have the highest scores early, as they do when they begin to learn."""
    results = [*[result(500, update=300) for _ in range(8)], *[result() for _ in range(8)]]
    for _, one in results:
        for alarm in ALARMS:
            one["alarm_scores"][alarm][:20] = [99.0] * 20  # steps 0 ... 190
    assert judge_alarms(results, 190).outcome.value == "shown"
    assert judge_alarms(results, 180).outcome.value == "contradicted at this scale"


def test_the_table_has_a_row_per_alarm() -> None:
    (section,) = alarm_sections([*[result(500, entropy=300)] * 3, *[result()] * 3], 0)
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == list(ALARMS)
    assert section.table.rows[1][2:] == ("1", "1", "3 of 3", "200")


def test_scores_come_from_lines_of_metrics() -> None:
    lines = [
        {
            "step": step,
            "row_range_by_head": [[2.0, math.exp(0.01 * step)]],
            "entropy_by_head": [[2.0, 4.0 if step < 50 else 1.0]],
            "update_entropy_by_head": [[None, 1.0]],
        }
        for step in range(0, 120, 10)
    ]
    series = alarm_series(iter(lines))
    assert list(series) == ["step", *ALARMS]
    assert series["step"] == list(range(0, 120, 10))
    assert series["row-range"][:9] == [None] * 9
    assert series["row-range"][9:] == pytest.approx([0.01] * 3)
    assert series["entropy"] == [0.0] * 5 + [0.75] * 7
    assert series["update"] == [0.0] * 12

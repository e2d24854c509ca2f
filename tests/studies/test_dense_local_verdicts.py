import random
from functools import partial

import pytest
from tests.studies.dense_local_results import make, result, run_all

from longshort.reporting.intervals import Interval
from longshort.studies.dense_local_arms import LOSS_FLOOR, illustrated_pair, pairs, sweep
from longshort.studies.dense_local_task import Fit
from longshort.studies.dense_local_verdicts import CLAIMS, compare, judge, verdicts
from longshort.studies.study import Outcome

BELOW, ABOVE, AROUND = Interval(-2, -3, -1, 3), Interval(2, 1, 3, 3), Interval(0, -1, 1, 3)


def outcomes(run, seeds=3, results=None):
    results = run_all(run, seeds=seeds) if results is None else results
    return [verdict.outcome for verdict in verdicts("smoke", range(seeds), results)]


@pytest.mark.parametrize(
    ("intervals", "outcome"),
    [
        ([BELOW] * 12, Outcome.SHOWN),
        ([BELOW] * 11 + [AROUND], Outcome.PARTLY),
        ([BELOW] * 9 + [ABOVE] * 3, Outcome.PARTLY),
        ([BELOW] * 6 + [ABOVE] * 6, Outcome.PARTLY),
        ([BELOW] * 5 + [AROUND] * 7, Outcome.NOT_SHOWN),
        ([BELOW] * 5 + [ABOVE] * 7, Outcome.CONTRADICTED),
        ([AROUND] * 6 + [ABOVE] * 6, Outcome.NOT_SHOWN),
        ([AROUND] * 12, Outcome.NOT_SHOWN),
        ([ABOVE] * 12, Outcome.CONTRADICTED),
        ([BELOW] * 11 + [None], Outcome.NOT_MEASURED),
        ([BELOW] * 11 + [Interval(-2, float("-inf"), float("inf"), 1)], Outcome.NOT_MEASURED),
        ([BELOW] * 11 + [Interval(float("nan"), float("-inf"), float("inf"), 3)], Outcome.PARTLY),
        ([], Outcome.NOT_MEASURED),
    ],
)
def test_the_rule(intervals, outcome):
    assert judge(intervals) == outcome


def test_a_planted_effect_is_shown():
    assert outcomes(make(lambda _fit: 0.1)) == [Outcome.ILLUSTRATED, Outcome.SHOWN, Outcome.SHOWN]


def test_an_absent_effect_is_not_shown():
    assert outcomes(make(lambda _fit: 1.0)) == [Outcome.ILLUSTRATED, Outcome.NOT_SHOWN, Outcome.NOT_SHOWN]


def test_swapped_labels_contradict():
    swapped = outcomes(make(lambda _fit: 10.0))
    assert swapped == [Outcome.ILLUSTRATED, Outcome.CONTRADICTED, Outcome.CONTRADICTED]


def test_windows_that_are_too_narrow_keep_a_claim_from_being_shown():
    run = make(lambda fit: 100.0 if fit.window < fit.span else 0.1)
    assert outcomes(run) == [Outcome.ILLUSTRATED, Outcome.PARTLY, Outcome.PARTLY]


def test_the_verdict_must_hold_at_the_next_lower_rate_too():
    """A local arm that is better at its best rate alone."""

    def run(trial):
        fit = Fit(**trial.settings)
        noise = random.Random(trial.key).lognormvariate(0, 0.05)
        is_best = fit.learning_rate == 0.1
        factor = 0.1 if is_best and fit.window is not None else 1.0
        return result(fit, (0.01 if is_best else 0.02) * factor * noise, 20 * factor * noise)

    assert outcomes(run) == [Outcome.ILLUSTRATED, Outcome.NOT_SHOWN, Outcome.NOT_SHOWN]


def test_losses_below_the_floor_are_alike():
    def run(trial):
        fit = Fit(**trial.settings)
        loss = LOSS_FLOOR / (10 if fit.window is None else 1000)
        return result(fit, loss, 20.0 if fit.window is None else 2.0 + 0.01 * fit.seed)

    assert outcomes(run) == [Outcome.ILLUSTRATED, Outcome.NOT_SHOWN, Outcome.SHOWN]


def test_a_seed_that_diverges_leaves_its_combinations_undecided():
    def run(trial):
        made = make(lambda _fit: 0.1)(trial)
        return made | ({"loss": None, "max_logit": None} if trial.seed == 1 else {})

    assert outcomes(run) == [Outcome.ILLUSTRATED, Outcome.NOT_SHOWN, Outcome.NOT_SHOWN]


def test_nothing_is_judged_before_all_is_run_nor_from_one_seed():
    unknown = [Outcome.ILLUSTRATED, Outcome.NOT_MEASURED, Outcome.NOT_MEASURED]
    assert outcomes(None, results={}) == unknown
    assert outcomes(make(lambda _fit: 0.1), seeds=1) == unknown


def test_evidence_counts_combinations():
    results = run_all(make(lambda fit: 10.0 if fit.window < fit.span else 0.1))
    for verdict in verdicts("smoke", range(3), results)[1:]:
        assert "at best rates lower in 9 and higher in 3" in verdict.evidence
        assert "12 combinations" in verdict.evidence
    assert "12 not run" in verdicts("smoke", range(3), {})[1].evidence


def test_values_are_paired_by_seed_at_each_arms_own_rate():
    results = run_all(make(lambda _fit: 0.5))
    pair = illustrated_pair("smoke")
    comparison = compare(pair, range(3), results)
    assert comparison is not None and sorted(comparison.local.by_seed) == [0, 1, 2]
    assert comparison.log_ratio("loss").count == 3
    assert comparison.log_ratio("loss").exp().mean == pytest.approx(0.5, rel=0.2)
    assert comparison.other.in_band(8) == comparison.other.values("max_logit")
    assert comparison.local.sweep == sweep(pair.local, results)
    grid = next(pair for pair in pairs("smoke") if pair.topic == "grid")
    lower = compare(grid, range(3), results, lower=1)
    at_best = compare(grid, range(3), results)
    assert lower is not None and at_best is not None
    assert lower.other.by_seed[0]["loss"] > at_best.other.by_seed[0]["loss"]


def test_each_claim_states_what_would_speak_against_it_and_its_rule():
    assert [claim.id for claim in CLAIMS] == ["F2a,b", "F2c", "F2d"]
    assert all(claim.falsifier and claim.rule for claim in CLAIMS)


def test_noise_alone_seldom_looks_like_an_effect():
    run = partial(make, lambda _fit: 1.0)
    for noise in (0.01, 0.1, 0.3):
        assert outcomes(run(noise=noise))[1:] == [Outcome.NOT_SHOWN] * 2

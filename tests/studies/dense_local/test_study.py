from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tests.studies.dense_local.planted_fits import STUDY, make, result, run_all
from tests.studies.planted import fill

from longshort.reporting.intervals import Interval
from longshort.studies.dense_local.arms import (
    arm_of,
    equal_freedom_head_dim,
    frontier_trials,
    illustrated_pair,
    measure_pairs,
    name_of,
    pairs,
)
from longshort.studies.dense_local.layer import run_layer_fit
from longshort.studies.dense_local.study import CLAIMS, outcome, verdicts
from longshort.studies.dense_local.task import LOSS_FLOOR, Fit, run_fit
from longshort.studies.framework.study import Outcome, Trial, Workplace
from longshort.studies.framework.sweep import sweep


@pytest.mark.parametrize("scale", STUDY.scales)
def test_the_grid_is_whole_and_arms_of_a_pair_differ_in_their_window_alone(scale):
    for topic, windows in (("grid", (1, 2, 4)), ("narrow", (0.5,))):
        fits = [pair.local for pair in pairs(scale) if pair.topic == topic]
        ratios = {(fit.span / fit.head_dim, (fit.window or 0) / fit.span) for fit in fits}
        assert ratios == {(a, b) for a in (0.5, 1, 4) for b in windows}
        assert all(fit.to_plateau and fit.decay_steps for fit in fits)
    for pair in pairs(scale):
        if pair.other_name == "global":
            assert pair.other == replace(pair.local, window=None)
    controls = [pair.other for pair in pairs(scale) if pair.topic == "control"]
    assert [fit.alibi_slope > 0 for fit in controls] == [True, False, False]
    assert controls[1].head_dim > controls[0].head_dim and controls[2].start_window


@pytest.mark.parametrize("scale", STUDY.scales)
def test_names_tell_arms_apart(scale):
    arms = {arm for pair in pairs(scale) for arm in pair.fits}
    arms |= {replace(Fit(**trial.settings), learning_rate=1.0) for trial in frontier_trials(scale, 0)}
    assert len({name_of(arm) for arm in arms}) == len(arms)


@pytest.mark.parametrize("scale", ["laptop", "overnight", "paper"])
def test_windows_of_the_grid_are_narrower_than_the_text(scale):
    grid = [pair.local for pair in pairs(scale) if pair.topic in ("grid", "narrow")]
    assert all(fit.window is not None and fit.window < fit.length for fit in grid)


def test_equal_freedom_counts_parameters_per_score():
    local = Fit(length=4, head_dim=7, span=2, window=2, learning_rate=1.0, steps=1, seed=0)
    assert equal_freedom_head_dim(local) == 10  # 7 scores with 7 each, 10 scores


def test_trials_of_an_arm_differ_in_rate_and_seed_alone():
    arm = arm_of(illustrated_pair("smoke").other)
    first, second = arm.trial(0.1, 0), arm.trial(0.316, 1)
    assert first.arm == second.arm and first.key != second.key
    differing = {name for name, value in first.settings.items() if value != second.settings[name]}
    assert differing == {"learning_rate", "seed"}
    assert second.seed == second.settings["seed"] == 1


@pytest.mark.parametrize("topic", ["control", "precision", "layer"])
def test_trials_of_the_paper_scale_can_be_stepped(topic):
    pair = next(pair for pair in pairs("paper") if pair.topic == topic)
    fit = replace(Fit(**arm_of(pair.other).trial(0.01, 0).settings), steps=1)
    run = run_layer_fit if topic == "layer" else run_fit
    found = run(fit, "cpu")
    assert found["loss"] > 0 and len(found["losses"]) == 2


def test_arms_begin_their_sweeps_where_their_rates_are():
    fit = illustrated_pair("smoke").other
    kinds = (fit, replace(fit, optimizer="sgd"), replace(fit, form="learned"))
    assert [arm_of(kind).ladder.rates[1] for kind in kinds] == [0.1, 100.0, 0.01]
    ladder = arm_of(fit).ladder
    assert (ladder.digits, ladder.floor, ladder.loss) == (3, LOSS_FLOOR, "loss")


def test_planted_results_find_the_planted_rate():
    results = run_all(make(lambda _fit: 1.0, best_rate=0.0316), seeds=2)
    assert sweep(arm_of(illustrated_pair("smoke").other), results, 0).best == 0.0316


@pytest.fixture
def planted():
    return make(lambda _fit: 0.3)


def keys(plan):
    return [trial.key for trial in plan.trials]


def test_the_plan_is_a_pure_function(planted):
    results = run_all(planted)
    assert keys(STUDY.plan("smoke", range(3), results)) == keys(STUDY.plan("smoke", range(3), dict(results)))
    assert keys(STUDY.plan("smoke", range(3), {})) == keys(STUDY.plan("smoke", range(3), {}))


def test_a_stopped_study_goes_on_to_the_same_trials(planted):
    whole = run_all(planted)
    rng = random.Random(0)
    for share in (0.1, 0.5, 0.9):
        kept = {key: value for key, value in whole.items() if rng.random() < share}
        assert run_all(planted, results=kept) == whole


def test_the_plan_holds_every_arm_on_all_seeds_and_the_grid_at_two_rates(planted):
    results = run_all(planted)
    plan = STUDY.plan("smoke", range(3), results)
    assert len(set(keys(plan))) == len(plan.trials) == len(results)
    assert plan.later_work == 0
    for pair in pairs("smoke"):
        for arm in map(arm_of, pair.fits):
            found = sweep(arm, results, 0)
            assert found.is_done
            for rate in (found.best, found.lower) if pair.topic == "grid" else (found.best,):
                assert {arm.trial(rate, seed).key for seed in range(3)} <= set(results)
    drawn = [trial for trial in plan.trials if trial.settings["crop"]]
    assert {trial.settings["window"] is None for trial in drawn} == {True, False}
    assert any(trial.settings["logit_limit"] for trial in plan.trials)


def test_trials_outside_the_grid_are_those_of_earlier_versions():
    """Their results stay valid: fields that came later are left out where they change nothing."""
    trial = next(t for t in STUDY.plan("laptop", [0], {}).trials if "to_plateau" not in t.settings)
    assert "decay_steps" not in trial.settings and Fit(**trial.settings).decay_steps == 0
    committed = Path(__file__).parents[3] / "docs/results/laptop/dense-local/results.jsonl"
    known = {json.loads(line)["key"] for line in committed.read_text().splitlines()}
    planned = [t for t in STUDY.plan("laptop", range(3), {}).trials if "to_plateau" not in t.settings]
    assert planned and {trial.key for trial in planned} <= known


def test_the_grid_of_the_laptop_takes_less_than_half_an_hour():
    results = fill(STUDY, "laptop", range(3), make(lambda _fit: 0.5))
    trials = STUDY.plan("laptop", range(3), results).trials
    assert 60 < sum(trial.work for trial in trials) / 2 < 30 * 60  # seconds on two cores, if no plateau comes


def test_trials_depend_on_the_rates_that_were_found():
    slow, fast = (run_all(make(lambda _fit: 1.0, best_rate=rate)) for rate in (0.01, 0.316))
    assert slow.keys() != fast.keys()


@pytest.mark.parametrize("scale", STUDY.scales)
def test_work_that_is_not_known_yet_is_counted(scale):
    seeds = STUDY.default_seeds(scale)
    assert seeds >= 2
    plan = STUDY.plan(scale, range(seeds), {})
    assert plan.later_work > 0 and all(trial.work > 0 for trial in plan.trials)
    assert {trial.seed for trial in plan.trials} == {0}


def test_the_smoke_scale_runs(tmp_path):
    """Every kind of trial for real; what the rest of the plan gives is made up."""
    workplace = Workplace(tmp_path, "")
    kinds, planted = set(), make(lambda _fit: 0.5)

    def run(trial: Trial):
        kind = tuple(
            trial.settings.get(name)
            for name in ("form", "optimizer", "precision", "alibi_slope", "start_window", "logit_limit",
                         "has_band", "crop", "to_plateau")
        )  # fmt: skip
        if kind in kinds:
            return planted(trial)
        kinds.add(kind)
        result = STUDY.run(trial, workplace)
        assert STUDY.run(trial, workplace) == result
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        return result

    results = run_all(run, seeds=2)
    assert len(kinds) >= 12
    findings = STUDY.findings("smoke", range(2), results, tmp_path)
    assert [verdict.claim for verdict in findings.verdicts] == list(STUDY.claims)
    assert all(figure.file.exists() for section in findings.sections for figure in section.figures)


BELOW, ABOVE, AROUND = Interval(-2, -3, -1, 3), Interval(2, 1, 3, 3), Interval(0, -1, 1, 3)


def judged(results, seeds=3):
    return verdicts("smoke", measure_pairs("smoke", range(seeds), results))


def outcomes(run, seeds=3, results=None):
    results = run_all(run, seeds=seeds) if results is None else results
    return [verdict.outcome for verdict in judged(results, seeds)]


@pytest.mark.parametrize(
    ("intervals", "expected"),
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
def test_the_rule(intervals, expected):
    assert outcome(intervals) == expected


def test_a_planted_effect_is_shown():
    assert outcomes(make(lambda _fit: 0.1)) == [Outcome.ILLUSTRATED, Outcome.SHOWN, Outcome.SHOWN]


def test_an_absent_effect_is_not_shown():
    assert outcomes(make(lambda _fit: 1.0)) == [Outcome.ILLUSTRATED, Outcome.NOT_SHOWN, Outcome.NOT_SHOWN]


def test_swapped_labels_contradict():
    swapped = outcomes(make(lambda _fit: 10.0))
    assert swapped == [Outcome.ILLUSTRATED, Outcome.CONTRADICTED, Outcome.CONTRADICTED]


def test_windows_that_are_too_narrow_do_not_count():
    for narrow, other, expected in ((100.0, 0.1, Outcome.SHOWN), (0.1, 1.0, Outcome.NOT_SHOWN)):
        run = make(lambda fit, narrow=narrow, other=other: narrow if fit.window < fit.span else other)
        assert outcomes(run) == [Outcome.ILLUSTRATED, expected, expected]


def test_both_sides_of_the_grid_have_the_rates_of_the_global_one():
    """Local fits are best at a rate at which global ones are bad: neither side is run there."""

    def run(trial):
        fit = Fit(**trial.settings)
        best = 0.1 if fit.window is None else 1.0
        return make(lambda _fit: 0.1, best_rate=best)(trial)

    found = measure_pairs("smoke", range(3), run_all(run))
    for pair, measured in found.items():
        rates = [measured.local.sweep.best, measured.other.sweep.best]
        assert rates == [0.1, 0.1] if pair.topic in ("grid", "narrow") else rates[0] > 0.1


@pytest.mark.parametrize("late", ["local", "global"])
def test_a_claim_is_open_while_a_fit_is_on_no_plateau(late):
    def run(trial):
        made = make(lambda _fit: 0.1)(trial)
        fit = Fit(**trial.settings)
        is_late = (fit.window is None) == (late == "global") and fit.span == 16 and fit.seed == 2
        return made | ({"plateau_at": None} if is_late and fit.to_plateau else {})

    results = run_all(run)
    assert outcomes(None, results=results)[1:] == [Outcome.NOT_REACHED] * 2
    evidence = judged(results)[1].evidence
    assert f"of 72 fits did not reach a plateau in the steps that they had: {late}" in evidence
    assert "at 1e-1" in evidence and "at 3.16e-2" in evidence


def test_narrow_windows_need_no_plateau():
    def run(trial):
        fit = Fit(**trial.settings)
        is_narrow = fit.window is not None and fit.window < fit.span
        return make(lambda _fit: 0.1)(trial) | ({"plateau_at": None} if is_narrow else {})

    assert outcomes(run)[1:] == [Outcome.SHOWN] * 2


def test_the_verdict_must_hold_at_the_next_lower_rate_too():
    """A local arm that is better at the best rate alone."""

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
    results = run_all(make(lambda fit: 10.0 if fit.window == fit.span else 0.1))
    for verdict in judged(results)[1:]:
        assert "at the global side's best rates lower in 6 and higher in 3" in verdict.evidence
        assert "9 combinations" in verdict.evidence
    assert "9 not run" in judged({})[1].evidence


def test_values_are_paired_by_seed_at_each_arms_own_rate():
    results = run_all(make(lambda _fit: 0.5))
    found = measure_pairs("smoke", range(3), results)
    measured = found[illustrated_pair("smoke")]
    assert sorted(measured.local.by_rate["best"]) == [0, 1, 2]
    assert measured.log_ratio("loss").count == 3
    assert measured.log_ratio("loss").exp().mean == pytest.approx(0.5, rel=0.2)
    assert measured.local.sweep == sweep(arm_of(measured.pair.local), results, 0)
    grid = next(found[pair] for pair in found if pair.topic == "grid")
    assert grid.is_run_at("lower")
    at_lower, at_best = (grid.other.by_rate[rate][0]["loss"] for rate in ("lower", "best"))
    assert at_lower > at_best


def test_losses_below_the_floor_count_as_it():
    results = run_all(lambda trial: result(Fit(**trial.settings), LOSS_FLOOR / 10, 1.0))
    measured = measure_pairs("smoke", range(3), results)[illustrated_pair("smoke")]
    assert measured.local.values("loss") == dict.fromkeys(range(3), LOSS_FLOOR)


def test_each_claim_states_what_would_speak_against_it_and_its_rule():
    assert [claim.id for claim in CLAIMS] == ["F2a,b", "F2c", "F2d"]
    assert all(claim.falsifier and claim.rule for claim in CLAIMS)


def test_noise_alone_seldom_looks_like_an_effect():
    for noise in (0.01, 0.1, 0.3):
        assert outcomes(make(lambda _fit: 1.0, noise=noise))[1:] == [Outcome.NOT_SHOWN] * 2

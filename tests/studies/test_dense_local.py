import json
import random

import pytest
from tests.studies.dense_local_results import STUDY, make, run_all

from longshort.studies.dense_local_arms import pairs, sweep, trial_of
from longshort.studies.study import SCALES, Trial, Workplace


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
        for arm in (pair.local, pair.other):
            best = sweep(arm, results).best
            assert best is not None
            for lower in (0, 1) if pair.topic == "grid" else (0,):
                assert {trial_of(arm, best - lower, seed).key for seed in range(3)} <= set(results)
    drawn = [trial for trial in plan.trials if trial.settings["crop"]]
    assert {trial.settings["window"] is None for trial in drawn} == {True, False}
    assert any(trial.settings["logit_limit"] for trial in plan.trials)


def test_trials_depend_on_the_rates_that_were_found():
    slow, fast = (run_all(make(lambda _fit: 1.0, best_rung=rung)) for rung in (-4, -1))
    assert slow.keys() != fast.keys()


@pytest.mark.parametrize("scale", SCALES)
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
            trial.settings[name]
            for name in ("form", "optimizer", "precision", "alibi_slope", "start_window", "logit_limit",
                         "has_band", "crop")
        )  # fmt: skip
        if kind in kinds:
            return planted(trial)
        kinds.add(kind)
        result = STUDY.run(trial, workplace)
        assert STUDY.run(trial, workplace) == result
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        return result

    results = run_all(run, seeds=2)
    assert len(kinds) >= 11
    findings = STUDY.findings("smoke", range(2), results, tmp_path)
    assert [verdict.claim for verdict in findings.verdicts] == list(STUDY.claims)
    assert all(figure.file.exists() for section in findings.sections for figure in section.figures)

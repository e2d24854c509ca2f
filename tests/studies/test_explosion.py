from __future__ import annotations

import pytest
from tests.studies.planted import fill, judge, language_result, noise, swept

from longshort.studies.explosion import DIVERGENCE, MECHANISM, RATIO, Explosion

STUDY = Explosion()


def by_arm(logits, diverged=None, spread=0.02, growth=1.5):
    def result_of(trial):
        return language_result(
            trial,
            loss=2.0 + swept(trial) + 0.01 * noise(trial),
            max_logit=logits(trial.arm) * (1 + spread * noise(trial)),
            diverged_at=diverged(trial) if diverged else None,
            growth=growth,
        )

    return result_of


def test_identical_arms_show_nothing(tmp_path):
    found = judge(STUDY, "laptop", by_arm(lambda arm: 30.0), tmp_path)
    assert found == {
        DIVERGENCE.id: "not shown at this scale",
        RATIO.id: "not shown at this scale",
        MECHANISM.id: "not shown at this scale",
    }


def test_a_planted_explosion_is_shown(tmp_path):
    def logits(arm):
        return 400.0 if arm == "MHSA" else 10.0

    def diverged(trial):
        return 700 if trial.arm == "MHSA" and trial.settings["train"]["learning_rate"] == 1e-2 else None

    found = judge(STUDY, "laptop", by_arm(logits, diverged), tmp_path)
    assert set(found.values()) == {"shown"}


def test_a_smaller_ratio_is_partly_shown(tmp_path):
    found = judge(STUDY, "laptop", by_arm(lambda arm: 60.0 if arm == "MHSA" else 12.0), tmp_path)
    assert found[RATIO.id] == "partly shown"


def test_the_reverse_is_contradicted(tmp_path):
    def diverged(trial):
        return 700 if trial.arm == "LS" and trial.settings["train"]["learning_rate"] == 1e-2 else None

    found = judge(STUDY, "laptop", by_arm(lambda arm: 10.0 if arm == "MHSA" else 60.0, diverged), tmp_path)
    assert set(found.values()) == {"contradicted at this scale"}


def test_one_diverging_seed_of_three_is_not_enough(tmp_path):
    def diverged(trial):
        return 700 if (trial.arm, trial.seed) == ("MHSA", 1) else None

    found = judge(STUDY, "laptop", by_arm(lambda arm: 30.0, diverged), tmp_path)
    assert found[DIVERGENCE.id] == "not shown at this scale"


def test_growth_alike_on_permuted_text_speaks_against_the_mechanism(tmp_path):
    found = judge(
        STUDY,
        "laptop",
        by_arm(lambda arm: 60.0 if arm.startswith("MHSA") and "+" not in arm else 12.0),
        tmp_path,
    )
    assert found[MECHANISM.id] == "not shown at this scale"


def test_a_flat_rope_speaks_against_the_mechanism(tmp_path):
    found = judge(STUDY, "laptop", by_arm(lambda arm: 60.0 if arm == "MHSA" else 12.0, growth=1.01), tmp_path)
    assert found[MECHANISM.id] == "not shown at this scale"


def test_a_verdict_must_hold_at_the_next_lower_rate_too(tmp_path):
    def result_of(trial):
        is_lower = trial.settings["train"]["learning_rate"] == 1e-3
        logit = 30.0 if is_lower or trial.arm != "MHSA" else 900.0
        return language_result(trial, loss=2.0 + swept(trial), max_logit=logit * (1 + 0.02 * noise(trial)))

    assert judge(STUDY, "laptop", result_of, tmp_path)[RATIO.id] == "not shown at this scale"


def test_lost_runs_leave_no_verdict_shown(tmp_path):
    def result_of(trial):
        result = language_result(trial, loss=2.0 + swept(trial), max_logit=30.0)
        return {**result, "max_logit": None} if trial.arm == "MHSA" else result

    assert judge(STUDY, "laptop", result_of, tmp_path)[RATIO.id] == "not shown at this scale"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "overnight", "paper"])
def test_arms_are_fair(scale):
    results = fill(STUDY, scale, range(3), by_arm(lambda arm: 30.0))
    trials = STUDY.plan(scale, range(3), results).trials
    assert len({trial.key for trial in trials}) == len(trials)
    plain = trials[0].settings["model"]
    arms = {"MHSA": set(), "LS": set()}
    for trial in trials:
        settings = {name: value for name, value in trial.settings["train"].items() if name != "mhsa"}
        assert settings["schedule"] == "constant"
        if trial.settings["model"] == plain and "token_order" not in settings:
            kind = "MHSA" if trial.settings["train"].get("mhsa") else "LS"
            arms[kind].add(tuple(settings.items()))
    assert arms["MHSA"] == arms["LS"]

from __future__ import annotations

import pytest
from tests.studies.planted import fill, findings_of, judge, outcomes
from tests.studies.planted_progress import planted

from longshort.studies.language.alarms import WARNING
from longshort.studies.language.arms import model_config
from longshort.studies.language.trial import probe_series
from longshort.studies.progress.design import ENOUGH, NEEDED, copying_step
from longshort.studies.progress.logits import DIVERGENCE, GROWTH, MITIGATION, RATIO, SOONER
from longshort.studies.progress.mechanism import MECHANISM
from longshort.studies.progress.remedies import REMEDIES
from longshort.studies.progress.study import Progress

STUDY = Progress()
NOT_MEASURED = "not measured at this scale"
NOT_SHOWN, SHOWN, PARTLY, AGAINST, OPEN = (
    "not shown at this scale", "shown", "partly shown", "contradicted at this scale", "open: not reached",
)  # fmt: skip


def test_identical_arms_are_alike(tmp_path):
    found = judge(STUDY, "laptop", planted(), tmp_path)
    assert found == {
        DIVERGENCE.id: NOT_SHOWN, RATIO.id: AGAINST, GROWTH.id: NOT_SHOWN, MITIGATION.id: NOT_SHOWN,
        SOONER.id: AGAINST, ENOUGH.id: SHOWN, NEEDED.id: NOT_SHOWN, MECHANISM.id: NOT_MEASURED,
        WARNING.id: NOT_MEASURED, REMEDIES.id: NOT_MEASURED,
    }  # fmt: skip


def test_an_arm_that_has_not_learned_leaves_claims_open(tmp_path):
    found = judge(STUDY, "laptop", planted(lambda trial: 0.3 if trial.arm == "MHSA" else 1.0), tmp_path)
    assert found[RATIO.id] == found[SOONER.id] == OPEN
    found = judge(STUDY, "laptop", planted(copies=False), tmp_path)
    assert found[ENOUGH.id] == found[NEEDED.id] == OPEN


def test_a_planted_ratio_of_1_to_25_is_shown(tmp_path):
    def logit(trial, loss):
        return (250.0 if trial.arm.startswith("MHSA") else 10.0) / loss

    assert judge(STUDY, "laptop", planted(logit=logit), tmp_path)[RATIO.id] == SHOWN


@pytest.mark.parametrize(("mhsa", "outcome"), [(50.0, PARTLY), (10.0, AGAINST), (5.0, AGAINST)])
def test_other_ratios(tmp_path, mhsa, outcome):
    def logit(trial, loss):
        return mhsa if trial.arm.startswith("MHSA") else 10.0

    assert judge(STUDY, "laptop", planted(logit=logit), tmp_path)[RATIO.id] == outcome


def test_logits_are_compared_where_the_losses_are_equal(tmp_path):
    """LS is ahead at every step, so its logits are larger there; at equal losses they are as large."""
    found = judge(
        STUDY,
        "laptop",
        planted(lambda trial: 1.5 if trial.arm.startswith("LS") else 1.0, lambda _, loss: 30.0 / loss**3),
        tmp_path,
    )
    assert found[RATIO.id] == AGAINST
    assert found[SOONER.id] == SHOWN


def test_logits_that_grow_with_length(tmp_path):
    def logit(trial, loss):
        return trial.settings["train"]["sequence_length"] ** 0.3

    assert judge(STUDY, "laptop", planted(logit=logit), tmp_path)[GROWTH.id] == SHOWN

    def shrinking(trial, loss):
        return 1 / logit(trial, loss)

    assert judge(STUDY, "laptop", planted(logit=shrinking), tmp_path)[GROWTH.id] == AGAINST


@pytest.mark.parametrize(
    ("factors", "outcome"),
    [
        ({}, NOT_SHOWN),
        ({256: 0.5, 512: 0.5, 1024: 0.5, 2048: 0.5}, SHOWN),
        ({256: 0.5, 512: 0.5, 1024: 0.5}, PARTLY),
        ({256: 0.5, 512: 0.5}, NOT_SHOWN),
        ({256: 0.5, 512: 2.0, 1024: 2.0, 2048: 2.0}, AGAINST),
    ],
)
def test_logits_that_are_smaller_at_each_length(tmp_path, factors, outcome):
    def logit(trial, loss):
        return 10 * (factors.get(trial.settings["train"]["sequence_length"], 1) if trial.arm == "LS" else 1)

    result_of = planted(logit=logit)
    by_length = STUDY.scales["overnight"].length_arms.values()
    trials = [arm.trial(3e-3, seed) for arms in by_length for arm in arms.values() for seed in range(3)]
    found = findings_of(
        STUDY, "overnight", range(3), {trial.key: result_of(trial) for trial in trials}, tmp_path
    )
    assert outcomes(found)[MITIGATION.id] == outcome


def sizes_and_hiding(power, hidden, hidden_ls=1.0):
    """The largest logit by head_dim of MHSA alone, and its factor with hidden keys, for MHSA and LS."""

    def logit(trial, loss):
        is_mhsa = trial.arm.startswith("MHSA")
        head_dim = trial.settings["model"].get("head_dim", 16)
        factor = hidden if is_mhsa else hidden_ls
        return (head_dim**power if is_mhsa else 1.0) * (factor if "hidden_keys" in trial.settings else 1.0)

    return logit


def judge_mechanism(result_of, folder) -> str:
    """The verdict from the trials of the mechanism alone."""
    arms = STUDY.scales["overnight"].mechanism_arms
    trials = [arm.trial(arm.ladder.rates[0], seed) for arm in arms for seed in range(3)]
    results = {trial.key: result_of(trial) for trial in trials}
    return outcomes(findings_of(STUDY, "overnight", range(3), results, folder))[MECHANISM.id]


@pytest.mark.parametrize(
    ("logit", "outcome"),
    [
        (sizes_and_hiding(-0.4, 0.5), SHOWN),
        (sizes_and_hiding(-0.4, 0.5, 0.9), SHOWN),
        (sizes_and_hiding(-0.4, 1.0), PARTLY),
        (sizes_and_hiding(-0.4, 2.0), PARTLY),
        (sizes_and_hiding(0.0, 0.5), PARTLY),
        (sizes_and_hiding(0.0, 0.5, 0.5), NOT_SHOWN),  # hidden keys do as much for LS
        (sizes_and_hiding(0.0, 0.5, 0.3), NOT_SHOWN),
        (sizes_and_hiding(0.4, 1.0), AGAINST),
        (sizes_and_hiding(0.0, 2.0), AGAINST),
    ],
)
def test_logits_that_fall_with_head_dim_and_hidden_keys(tmp_path, logit, outcome):
    assert judge_mechanism(planted(logit=logit), tmp_path) == outcome


@pytest.mark.parametrize(
    ("late", "outcome"),
    [
        ("MHSA, 1 × 64", OPEN),
        ("LS, 50% of keys hidden", OPEN),
        ("LS, 8 × 8", SHOWN),
        ("MHSA, 75% of keys hidden", SHOWN),
    ],
)
def test_the_mechanism_is_open_only_where_the_runs_that_decide_it_do_not_learn(tmp_path, late, outcome):
    results = planted(lambda trial: 0.3 if trial.arm == late else 1.0, sizes_and_hiding(-0.4, 0.5))
    assert judge_mechanism(results, tmp_path) == outcome


def test_arms_of_other_head_sizes_differ_in_nothing_else():
    trials = {trial.arm: trial for trial in STUDY.plan("overnight", [0], {}).trials}
    configs = {
        name: model_config(trial.settings["model"], trial.settings["train"])
        for name, trial in trials.items()
        if " × " in name
    }
    assert sorted(configs) == ["LS, 2 × 32", "LS, 8 × 8", "MHSA, 1 × 64", "MHSA, 2 × 32", "MHSA, 8 × 8"]
    for name, config in configs.items():
        assert config.num_attention_heads * config.head_dim == config.hidden_size == 64
        assert config.num_global_heads == (1 if name.startswith("LS") else config.num_attention_heads)


RATES = STUDY.scales["overnight"].stress_rates


def test_divergence_needs_more_pairs_than_chance(tmp_path):
    def alone(arm, rates):
        return lambda trial: (
            700 if trial.arm == arm and trial.settings["train"]["learning_rate"] in rates else None
        )

    few = judge(STUDY, "overnight", planted(diverged=alone("MHSA", (6e-2,))), tmp_path)
    assert few[DIVERGENCE.id] == NOT_SHOWN  # 3 pairs: p = 0.25
    some = judge(STUDY, "overnight", planted(diverged=alone("MHSA", RATES[2:])), tmp_path)
    assert some[DIVERGENCE.id] == NOT_SHOWN  # 6 pairs: p = 0.03, too much beside the study's other claims
    many = judge(STUDY, "overnight", planted(diverged=alone("MHSA", RATES[1:])), tmp_path)
    assert many[DIVERGENCE.id] == SHOWN  # 9 pairs: p = 0.004
    reverse = judge(STUDY, "overnight", planted(diverged=alone("LS", RATES[1:])), tmp_path)
    assert reverse[DIVERGENCE.id] == AGAINST


def test_alarms_are_judged_on_the_runs_that_may_diverge(tmp_path):
    def high_rates(trial):
        return 700 if trial.settings["train"]["learning_rate"] >= 3e-2 else None

    found = judge(STUDY, "overnight", planted(diverged=high_rates), tmp_path)
    assert found[WARNING.id] == SHOWN
    assert judge(STUDY, "paper", planted(), tmp_path)[WARNING.id] == NOT_MEASURED
    stress = STUDY.scales["overnight"].stress
    assert stress is not None and stress.train["alarms"] and stress.train["monitor_every"] == 10


def test_global_heads_that_help(tmp_path):
    def speed(trial):
        return {"MHSA": 1.3, "LS, no global head": 0.8}.get(trial.arm, 1.0)

    found = judge(STUDY, "laptop", planted(speed, end=0.1), tmp_path)
    assert found[ENOUGH.id] == AGAINST
    assert found[NEEDED.id] == SHOWN


def test_half_of_the_results_are_drawn_and_judged_as_far_as_they_go(tmp_path):
    whole = fill(STUDY, "overnight", range(3), planted())
    for count in (0, 1, 5, len(whole) // 2):
        part = dict(list(whole.items())[:count])
        found = findings_of(STUDY, "overnight", range(3), part, tmp_path)
        is_measured = [outcome != NOT_MEASURED for outcome in outcomes(found).values()]
        assert any(is_measured) == (count > 5)


def test_other_seeds_are_predicted_at_the_end_and_at_equal_losses(tmp_path):
    results = fill(STUDY, "laptop", range(3), planted())
    found = findings_of(STUDY, "laptop", range(3), results, tmp_path).predictions
    assert list(found) == ["MHSA", "LS", "LS, no global head"]
    assert {"constant_loss", "validation_loss", "max_logit at 2.0", "row_range at 1.3"} <= set(found["LS"])
    interval = found["LS"]["max_logit at 2.0"]
    assert 9 < interval.low < interval.mean < interval.high < 11


def test_the_plan_runs_the_first_seed_first():
    trials = STUDY.plan("overnight", range(3), {}).trials
    assert len({trial.key for trial in trials}) == len(trials) == 159
    assert [(trial.arm, trial.seed) for trial in trials[:6]] == [
        ("MHSA", 0), ("LS", 0), ("LS, no global head", 0), ("MHSA + RoPE", 0), ("LS + RoPE", 0),
        ("LS + RoPE, none on global heads", 0),
    ]  # fmt: skip
    brief = [trial.settings["train"]["steps"] for trial in trials if "RoPE" in trial.arm]
    assert sorted(brief) == [3000] * 6 + [10_000] * 3


@pytest.mark.parametrize(
    ("curve", "constant_until", "step"),
    [
        ([[5, 3.0], [10, 2.51], [12, 0.5]], 10, None),
        ([[5, 3.0], [10, 2.51], [12, 0.5]], 12, 12),
        ([[5, 4.0], [10, 4.7], [15, None], [20, 4.25], [25, 4.2], [30, 1.0]], 30, 25),
        ([], 10, None),
    ],
    ids=["after the constant rate", "within it", "below the highest value before", "not measured"],
)
def test_copying_begins_where_the_loss_has_dropped(curve, constant_until, step):
    assert copying_step({"constant_until": constant_until, "copying_curve": curve}) == step


def test_a_probe_is_reduced_over_heads():
    reading = {
        "max_logit": [[1.0, 2.0], [8.0, 4.0]], "quantile": [[1.0, 1.0], [1.0, 2.0]],
        "row_range": [[1.0, None], [1.0, 1.0]], "max_logit_in_band": [[1.0, 1.5], [3.0, 2.0]],
        "quantile_in_band": None, "row_range_in_band": None,
    }  # fmt: skip
    found = probe_series([reading, reading])
    assert found["max_logit"] == [8.0, 8.0] and found["max_logit_median"] == [3.0, 3.0]
    assert found["max_logit_in_band"] == [3.0, 3.0] and found["max_logit_layer_1_head_0"] == [8.0, 8.0]
    assert found["row_range"] == found["row_range_median"] == [None, None]
    assert "quantile_in_band" not in found

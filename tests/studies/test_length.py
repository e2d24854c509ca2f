from __future__ import annotations

from tests.studies.planted import judge, language_result, noise, swept

from longshort.studies.length import GROWTH, MITIGATION, Length

STUDY = Length()


def planted(exponent, ls_exponent, ls_level=10.0):
    def result_of(trial):
        length = trial.settings["train"]["sequence_length"]
        power, level = (exponent, 10.0) if trial.arm.startswith("MHSA") else (ls_exponent, ls_level)
        logit = level * (length / 256) ** power * (1 + 0.05 * noise(trial))
        return language_result(trial, loss=2.0 + swept(trial), max_logit=logit)

    return result_of


def test_no_growth_is_not_shown(tmp_path):
    found = judge(STUDY, "laptop", planted(0.0, 0.0), tmp_path)
    assert found == {GROWTH.id: "not shown at this scale", MITIGATION.id: "not shown at this scale"}


def test_planted_growth_is_shown(tmp_path):
    found = judge(STUDY, "laptop", planted(0.5, 0.0, ls_level=5.0), tmp_path)
    assert set(found.values()) == {"shown"}


def test_shrinking_logits_contradict(tmp_path):
    found = judge(STUDY, "laptop", planted(-0.5, 0.0, ls_level=40.0), tmp_path)
    assert set(found.values()) == {"contradicted at this scale"}


def test_growth_in_one_budget_is_partly_shown(tmp_path):
    def result_of(trial):
        settings = trial.settings["train"]
        tokens = settings["sequence_length"] * settings["batch_size"]
        power = 0.5 if tokens == 2048 else 0.0
        logit = 10.0 * (settings["sequence_length"] / 2048) ** power * (1 + 0.05 * noise(trial))
        return language_result(trial, loss=2.0 + swept(trial), max_logit=logit)

    assert judge(STUDY, "laptop", result_of, tmp_path)[GROWTH.id] == "partly shown"


def test_budgets_keep_tokens_or_sequences(tmp_path):
    trials = [t for t in STUDY.plan("overnight", range(2), {}).trials if t.arm == "MHSA"]
    sizes = {(t.settings["train"]["sequence_length"], t.settings["train"]["batch_size"]) for t in trials}
    assert {(256, 16), (2048, 2), (4096, 1), (256, 1), (2048, 1)} <= sizes

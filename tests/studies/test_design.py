from __future__ import annotations

from tests.studies.planted import fill, judge, language_result, noise, swept

from longshort.studies.design import ENOUGH, NEEDED, SPREAD, Design

STUDY = Design()


def planted(losses):
    def result_of(trial):
        loss = losses(trial.arm) + swept(trial) + 0.002 * noise(trial)
        return language_result(trial, loss=loss, max_logit=20.0)

    return result_of


def test_alike_layouts(tmp_path):
    found = judge(STUDY, "laptop", planted(lambda arm: 2.0), tmp_path)
    assert found == {
        ENOUGH.id: "shown",  # one global head is not worse than many
        NEEDED.id: "not shown at this scale",
        SPREAD.id: "not shown at this scale",
    }


def test_planted_differences(tmp_path):
    def losses(arm):
        return {"LS": 2.0, "MHSA": 1.8, "0 global heads": 2.3}.get(arm, 2.1)

    found = judge(STUDY, "laptop", planted(losses), tmp_path)
    assert found == {ENOUGH.id: "contradicted at this scale", NEEDED.id: "shown", SPREAD.id: "shown"}


def test_the_recommendation_is_the_smallest_cache_of_the_good_layouts(tmp_path):
    def losses(arm):
        return {"MHSA": 2.0, "LS": 2.01, "window 64": 2.012}.get(arm, 2.5)

    results = fill(STUDY, "laptop", range(3), planted(losses))
    _, text, late, rotary = STUDY.findings("laptop", range(3), results, tmp_path).sections[0].paragraphs
    assert "LS keeps the fewest keys: 25% of MHSA's" in text
    assert late.endswith("LS does not fall behind here.")
    assert rotary.startswith("Validation loss of LS + RoPE minus that of MHSA + RoPE: ")


def test_a_layout_that_keeps_up_with_mhsa_late_in_training_is_named(tmp_path):
    def result_of(trial):
        result = language_result(trial, loss=2.0 + swept(trial), max_logit=20.0)
        fall = 1.0 if trial.arm in ("MHSA", "window 64") else 0.5
        curve = [[step, 2.0 + fall * (loss - 2.0)] for step, loss in result["validation_curve"]]
        return {**result, "validation_curve": curve}

    results = fill(STUDY, "laptop", range(3), result_of)
    *_, late, _ = STUDY.findings("laptop", range(3), results, tmp_path).sections[0].paragraphs
    assert late.endswith("MHSA is catching up with LS, but not with window 64.")

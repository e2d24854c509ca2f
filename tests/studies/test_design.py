from __future__ import annotations

from pathlib import Path

import pytest
from tests.studies.planted import fill, findings_of, judge, language_result, noise, swept, table_of

from longshort.studies.design import SPREAD, Design
from longshort.studies.framework.store import ResultsFile
from longshort.studies.framework.study import Outcome

STUDY = Design()
NOT_SHOWN, AGAINST = "not shown at this scale", "contradicted at this scale"
BOTTOM, TOP = "2 global heads, bottom layer", "2 global heads, top layer"


def planted(losses):
    def result_of(trial):
        loss = losses.get(trial.arm, losses["others"]) + swept(trial) + 0.002 * noise(trial)
        return language_result(trial, loss=loss, max_logit=20.0)

    return result_of


@pytest.mark.parametrize(
    ("bottom", "top", "outcome"),
    [
        (2.0, 2.0, NOT_SHOWN),
        (2.1, 2.1, "shown"),
        (2.1, 2.0, "partly shown"),
        (2.1, 1.9, NOT_SHOWN),
        (1.9, 1.9, AGAINST),
    ],
)
def test_gathered_heads_are_judged_by_their_losses(tmp_path, bottom, top, outcome):
    losses = {BOTTOM: bottom, TOP: top, "others": 2.0}
    assert judge(STUDY, "laptop", planted(losses), tmp_path) == {SPREAD.id: outcome}


def test_the_verdict_waits_for_its_layouts(tmp_path):
    results = fill(STUDY, "laptop", range(3), planted({"others": 2.0}))
    top = next(arm for arm in STUDY.scales["laptop"].deciding if arm.name == TOP)
    del results[top.trial(3e-3, 2).key]
    (verdict,) = findings_of(STUDY, "laptop", range(3), results, tmp_path).verdicts
    assert (verdict.outcome, verdict.evidence) == (Outcome.NOT_MEASURED, "The trials are not done.")


def test_the_verdict_must_hold_at_the_next_lower_rates_too(tmp_path):
    def result_of(trial):
        rate = trial.settings["train"]["learning_rate"]
        return planted({BOTTOM: 2.1, TOP: 2.1 if rate >= 3e-3 else 2.0, "others": 2.0})(trial)

    assert judge(STUDY, "laptop", result_of, tmp_path) == {SPREAD.id: "partly shown"}


def test_sweeps_that_end_at_an_edge_are_named(tmp_path):
    def result_of(trial):
        falling = 2.0 + trial.settings["train"]["learning_rate"]
        return language_result(trial, loss=falling, max_logit=20.0)

    results = fill(STUDY, "laptop", range(3), result_of)
    (verdict,) = findings_of(STUDY, "laptop", range(3), results, tmp_path).verdicts
    assert f"Best rate at the edge of the sweep: LS (1e-4), {BOTTOM} (1e-4)" in verdict.evidence


def test_losses_stand_beside_those_of_ls_at_equal_steps_and_flops(tmp_path):
    results = fill(STUDY, "laptop", range(3), planted({"MHSA": 1.8, "others": 2.0}))
    findings = findings_of(STUDY, "laptop", range(3), results, tmp_path)
    rows = {name: cells for name, *cells in table_of(findings, "What they can do, and what they cost").rows}
    at_steps, at_flops = (float(cell.split()[0]) for cell in rows["MHSA"][:2])
    assert at_steps == pytest.approx(-0.2, abs=0.005)
    assert at_flops > at_steps  # MHSA is read off before it has spent all
    assert rows["LS"][:2] == ["", ""]
    pairs = table_of(findings, "LS-attention relative to MHSA").rows
    assert [row[0] for row in pairs] == ["LS", "LS + RoPE"]


def test_the_recommendation_is_the_smallest_cache_of_the_good_layouts(tmp_path):
    losses = {"MHSA": 2.0, "LS": 2.01, "windows 8, 16, 64": 2.012, "others": 2.5}
    results = fill(STUDY, "laptop", range(3), planted(losses))
    _, text, late = findings_of(STUDY, "laptop", range(3), results, tmp_path).sections[0].paragraphs
    assert "LS keeps the fewest keys: 25% of MHSA's" in text
    assert late.endswith("LS does not fall behind here.")


def test_a_layout_that_keeps_up_with_mhsa_late_in_training_is_named(tmp_path):
    def result_of(trial):
        result = language_result(trial, loss=2.0 + swept(trial), max_logit=20.0)
        fall = 1.0 if trial.arm in ("MHSA", TOP) else 0.5
        curve = [[step, 2.0 + fall * (loss - 2.0)] for step, loss in result["validation_curve"]]
        return {**result, "validation_curve": curve}

    results = fill(STUDY, "laptop", range(3), result_of)
    *_, late = findings_of(STUDY, "laptop", range(3), results, tmp_path).sections[0].paragraphs
    assert late.endswith(f"MHSA is catching up with LS, but not with {TOP}.")


def test_committed_trials_are_those_of_the_plan():
    results = ResultsFile(Path(__file__).parents[2] / "docs/results/laptop/design").results
    trials = STUDY.plan("laptop", range(3), results).trials
    assert all(trial.key in results for trial in trials)
    assert {trial.arm for trial in trials} == {
        "LS", "MHSA", BOTTOM, TOP, "windows 8, 16, 64", "LS + RoPE", "MHSA + RoPE"
    }  # fmt: skip

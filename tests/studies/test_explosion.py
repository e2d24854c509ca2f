from __future__ import annotations

import pytest
from tests.studies.planted import fill, findings_of, language_result, swept, table_of

from longshort.studies.explosion import Explosion

STUDY = Explosion()


def by_arm(logits, diverged=None):
    def result_of(trial):
        return language_result(
            trial,
            loss=2.0 + swept(trial) + (0.1 if trial.arm == "LS" else 0.0),
            max_logit=logits(trial.arm),
            diverged_at=diverged(trial) if diverged else None,
        )

    return result_of


def found(scale, result_of, folder):
    return findings_of(STUDY, scale, range(3), fill(STUDY, scale, range(3), result_of), folder)


def test_logits_and_losses_of_ls_stand_beside_those_of_mhsa(tmp_path):
    findings = found("smoke", by_arm(lambda arm: 10.0 if arm == "LS" else 40.0), tmp_path)
    assert not findings.verdicts
    assert findings.predictions["MHSA"]["max_logit"].mean == pytest.approx(40.0)
    ((name, *ratios, at_steps, at_flops),) = table_of(findings, "LS-attention relative to MHSA").rows
    assert (name, set(ratios), at_steps) == ("LS", {"0.25 [0.25, 0.25]"}, "+0.100 [+0.100, +0.100]")
    assert float(at_flops.split()[0]) < 0.1  # MHSA is read off before it has spent all
    tests = {row[0]: row[4] for row in table_of(findings, "Why do they grow?").rows}
    assert (len(tests), tests["MHSA"]) == (5, "40 [40, 40]")


def test_each_text_and_precision_has_its_own_comparison(tmp_path):
    findings = found("overnight", by_arm(lambda arm: 30.0), tmp_path)
    assert [row[0] for row in table_of(findings, "LS-attention relative to MHSA").rows] == [
        "LS", "LS, permuted text", "LS, interleaved text", "LS, fp32", "LS, bf16-flash"
    ]  # fmt: skip
    deep = table_of(findings, "The hybrid by layers").rows
    assert [row[0] for row in deep] == ["LS, 4 layers", "hybrid by layers, 4 layers"]


def test_diverged_seeds_are_counted_by_rate(tmp_path):
    def diverged(trial):
        is_stress = trial.settings["train"]["learning_rate"] == 1e-2
        return 700 if trial.arm == "MHSA" and is_stress and trial.seed else None

    rows = table_of(found("smoke", by_arm(lambda arm: 30.0, diverged), tmp_path), "Divergence").rows
    assert rows == [
        ("rate 3e-3", "0 of 3", "0 of 3"),
        ("rate 1e-2", "2 of 3 (step 700, 700)", "0 of 3"),
    ]


def test_lost_runs_are_called_not_finite(tmp_path):
    def result_of(trial):
        result = by_arm(lambda arm: 30.0)(trial)
        return {**result, "max_logit": None} if trial.arm == "MHSA" else result

    ((_, largest, in_window, *_),) = table_of(
        found("smoke", result_of, tmp_path), "LS-attention relative to MHSA"
    ).rows
    assert (largest, in_window) == ("not finite", "1 [1, 1]")


@pytest.mark.parametrize("scale", STUDY.scales)
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

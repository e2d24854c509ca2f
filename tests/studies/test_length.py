from __future__ import annotations

import pytest
from tests.studies.planted import fill, findings_of, language_result, noise, swept, table_of

from longshort.studies.length import SEQUENCES, TOKENS, Length

STUDY = Length()


@pytest.fixture
def findings(tmp_path):
    """Logits of MHSA that grow as the root of the length at equal tokens a step, and as the length itself at
    equal sequences; those of LS do not grow."""

    def result_of(trial):
        training = trial.settings["train"]
        tokens = training["sequence_length"] * training["batch_size"]
        power = 0.0 if trial.arm.startswith("LS") else 0.5 if tokens == 4096 else 1.0
        logit = 10.0 * (training["sequence_length"] / 4096) ** power * (1 + 0.001 * noise(trial))
        return language_result(trial, loss=2.0 + swept(trial), max_logit=logit)

    return findings_of(STUDY, "overnight", range(3), fill(STUDY, "overnight", range(3), result_of), tmp_path)


def test_growth_is_reported_by_variant_and_budget(findings):
    assert not findings.verdicts
    rows = table_of(findings, "Growth with the length").rows
    slopes = {name: float(over_all.split()[0]) for name, over_all, _ in rows}
    assert slopes == {
        f"{name}, {budget}": pytest.approx(slope, abs=0.001)
        for name, budget, slope in (
            ("MHSA", TOKENS, 0.5), ("MHSA", SEQUENCES, 1.0), ("LS", TOKENS, 0.0),
            ("MHSA + RoPE", TOKENS, 0.5), ("MHSA + RoPE", SEQUENCES, 1.0), ("LS + RoPE", TOKENS, 0.0),
        )
    }  # fmt: skip


def test_ls_stands_beside_mhsa_at_each_length(findings):
    rows = table_of(findings, "LS-attention relative to MHSA").rows
    ratios = {row[0]: float(row[1].split()[0]) for row in rows}
    lengths = (256, 512, 1024, 2048, 4096)
    assert ratios == {
        f"{name}, equal tokens a step, n = {n}": pytest.approx((4096 / n) ** 0.5, rel=0.01)
        for name in ("LS", "LS + RoPE")
        for n in lengths
    }


def test_one_length_has_no_growth(tmp_path):
    def result_of(trial):
        return language_result(trial, loss=2.0, max_logit=10.0)

    results = fill(STUDY, "smoke", range(2), result_of)
    part = {
        trial.key: results[trial.key]
        for trial in STUDY.plan("smoke", range(2), results).trials
        if trial.settings["train"]["sequence_length"] == 64
    }
    headings = [section.heading for section in findings_of(STUDY, "smoke", range(2), part, tmp_path).sections]
    assert headings == ["By sequence length", "LS-attention relative to MHSA"]


def test_budgets_keep_tokens_or_sequences():
    trials = [t for t in STUDY.plan("overnight", range(2), {}).trials if t.arm == "MHSA"]
    sizes = {(t.settings["train"]["sequence_length"], t.settings["train"]["batch_size"]) for t in trials}
    assert {(256, 16), (2048, 2), (4096, 1), (256, 1), (2048, 1)} <= sizes

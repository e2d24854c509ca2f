"""Figure 5, weight decay and rounding in the study `progress`, on planted results and a small run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.studies.planted import fill, findings_of, noise
from tests.studies.planted_progress import audit, planted

from longshort.studies.framework.comparison import measure_arms
from longshort.studies.framework.study import Outcome, Workplace, finished
from longshort.studies.progress.precision import error_over_seeds, precision_sections
from longshort.studies.progress.remedies import REMEDIES, judge_remedies
from longshort.studies.progress.study import Progress

STUDY = Progress()
SIZES = STUDY.scales["overnight"]


def speeds(ls=1.0, qk_norm=1.0, fp32=1.0):
    by_arm = {"LS": ls, "MHSA + QK-norm": qk_norm, "MHSA, fp32": fp32}
    return planted(lambda trial: by_arm.get(trial.arm, 1.0), end=0.9)


def judge_cost(result_of, fp32_seeds=1):
    """The outcome from the trials of figure 5 alone."""
    sizes = replace(SIZES, fp32_seeds=fp32_seeds)
    arms = {}
    for arm, seeds in [(sizes.main[1], range(3)), *sizes.remedy_arms(range(3))]:
        trials = [arm.trial(arm.ladder.rates[0], seed) for seed in seeds]
        results = {trial.key: result_of(trial) for trial in trials}
        arms |= measure_arms([arm], seeds, results, rates=("best",))
    return judge_remedies(arms).outcome


@pytest.mark.parametrize(
    ("result_of", "fp32_seeds", "outcome"),
    [
        (speeds(ls=2.0), 3, Outcome.SHOWN),
        (speeds(ls=2.0), 1, Outcome.PARTLY),  # one seed has no interval
        (speeds(ls=2.0, fp32=2.0), 3, Outcome.PARTLY),  # as many tokens as one, but fewer FLOPs
        (speeds(ls=2.0, fp32=4.0), 3, Outcome.NOT_SHOWN),  # dearer than one
        (speeds(), 3, Outcome.NOT_SHOWN),
        (speeds(qk_norm=3.0, fp32=3.0), 3, Outcome.CONTRADICTED),
        (speeds(qk_norm=3.0, fp32=0.9), 1, Outcome.CONTRADICTED),
        (speeds(qk_norm=0.4), 1, Outcome.NOT_REACHED),
        (speeds(fp32=0.2), 1, Outcome.NOT_REACHED),
    ],
)
def test_cost_against_other_remedies(result_of, fp32_seeds, outcome):
    assert judge_cost(result_of, fp32_seeds) is outcome


def test_cost_is_not_judged_before_every_baseline_is_measured():
    assert judge_cost(speeds(), fp32_seeds=0) is Outcome.NOT_MEASURED


def section(found, heading):
    return next(one for one in found.sections if one.heading.startswith(heading))


def findings(result_of, folder):
    return findings_of(STUDY, "overnight", range(3), fill(STUDY, "overnight", range(3), result_of), folder)


def growing(power):
    """MHSA's logits rise with a power of the step without weight decay, and are flat with it."""
    plain = planted()

    def result_of(trial):
        result = plain(trial)
        if trial.arm == "MHSA, no weight decay":
            steps, factor = result["probe"]["step"], 1 + 0.01 * noise(trial)
            result["probe"]["max_logit"] = [5 * factor * step**power for step in steps]
        return result

    return result_of


@pytest.mark.parametrize(
    ("power", "words"),
    [(0.5, "keeps growing"), (-0.5, "falls"), (0.0, "neither surely grows nor surely falls")],
)
def test_growth_without_weight_decay_is_said_and_not_judged(tmp_path, power, words):
    def flat_or_noisy(trial):
        result = growing(power)(trial)
        if power == 0.0 and trial.arm == "MHSA, no weight decay":  # one seed grows, the other falls
            steps = result["probe"]["step"]
            result["probe"]["max_logit"] = [step ** (0.3 if trial.seed else -0.3) for step in steps]
        return result

    found = findings(flat_or_noisy, tmp_path)
    told = section(found, "Without weight decay")
    assert words in told.paragraphs[1] and "There is no verdict" in told.paragraphs[1]
    assert told.table is not None
    with_decay, without = told.table.rows
    assert (with_decay[1], without[1]) == ("3", "2")
    assert with_decay[-1].startswith("1 [")
    assert float(without[-1].split()[0]) == pytest.approx(2**power, abs=0.01)
    verdict = next(verdict for verdict in found.verdicts if verdict.claim is REMEDIES)
    assert "1 seed" in verdict.evidence and "3 seeds" in verdict.evidence


def test_growth_is_measured_at_equal_steps_before_any_decay(tmp_path):
    """What happens after the constant rate of the shorter runs is left out."""
    plain = planted()

    def result_of(trial):
        result = plain(trial)
        probe = result["probe"]
        late = [
            (value, 1000.0)[step > 7200]
            for step, value in zip(*map(probe.get, ("step", "max_logit")), strict=True)
        ]
        return {**result, "probe": {**probe, "max_logit": late}}

    told = section(
        findings(lambda t: plain(t) if {"audit", "needle"} & t.settings.keys() else result_of(t), tmp_path),
        "Without",
    )
    assert told.table is not None and {row[-1].split()[0] for row in told.table.rows} == {"1"}


def test_a_planted_bias_is_named_with_its_sign():
    def bias(precision, matrix):
        return {"bf16-flash": 3e-3, "bf16": -2e-3}.get(precision, 0.0) if matrix == "k" else 0.0

    audits = {"MHSA": [audit(lambda p, m, shift=shift: bias(p, m) + shift) for shift in (-1e-4, 0.0, 1e-4)]}
    signed, noise_of, common = precision_sections(audits)
    named = signed.paragraphs[1]
    assert named.startswith("2 of 8 intervals of the bias exclude 0")
    assert "MHSA, K, bf16-flash: 0.003" in named and "MHSA, K, bf16: -0.002" in named
    assert ", Q, " not in named and "fp32" not in named
    assert signed.table is not None and [row[0] for row in signed.table.rows] == ["MHSA, Q", "MHSA, K"]
    assert noise_of.table is not None and noise_of.table.rows[0][1] == "0.05 [0.05, 0.05]"
    assert common.table is not None and common.table.rows[0][1] == "1 [1, 1]"


def test_weights_that_are_not_finite_and_precisions_left_out_are_told():
    lost = audit()
    lost["errors"] = [
        {**error, "bias": None} for error in lost["errors"] if error["precision"] != "sdpa-bf16"
    ]
    signed = precision_sections({"MHSA": [audit(), lost], "LS": [lost, lost]})[0]
    assert signed.table is not None
    assert signed.table.rows[0][1:] == ("not finite", "not finite", "not finite", "–")
    noisy = error_over_seeds([audit()], "bf16", "q", "noise")
    assert noisy is not None and noisy.mean == 0.05


def test_the_weights_that_are_measured_are_those_of_the_last_seeds():
    trials = STUDY.plan("overnight", range(5), {}).trials
    of_pair = [trial for trial in trials if trial.settings["train"]["steps"] == 10_000]
    for kind, arms in (("audit", 2), ("needle", 3)):
        assert [trial.seed for trial in of_pair if kind in trial.settings] == [2, 3, 4] * arms


def test_trainings_are_audited_where_all_seeds_are_done():
    trials = {**SIZES.pair_audits(range(3)), **SIZES.stress_audits(range(3))}
    assert len(trials) == 2 + 12 + 2
    results = {trial.key: audit() for of_arm in list(trials.values())[:2] for trial in of_arm}
    assert list(finished(trials, results)) == ["MHSA", "LS"]
    results.pop(trials["LS"][1].key)
    assert list(finished(trials, results)) == ["MHSA"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"text {number} says {number * 7} and ends\n" * 60)
    place = Workplace(folder, str(folder / "texts"))
    STUDY.prepare(place)
    return place


def test_an_audit_shares_the_training_of_its_trial(workplace):
    trained = next(trial for trial in STUDY.plan("smoke", [0], {}).trials if trial.arm == "MHSA")
    audited = STUDY.scales["smoke"].pair_audits([0])["MHSA"][0]
    STUDY.run(trained, workplace)
    runs = sorted(path.name for path in (workplace.folder / "runs").iterdir())
    found = STUDY.run(audited, workplace)
    assert sorted(path.name for path in (workplace.folder / "runs").iterdir()) == runs
    assert found == STUDY.run(audited, workplace)
    assert {error["precision"] for error in found["errors"]} == {"fp32", "bf16", "bf16-flash", "sdpa-bf16"}
    by_precision = {error["precision"]: error["noise"] for error in found["errors"]}
    assert by_precision["fp32"] < 0.01 * by_precision["bf16"]
    assert found["step"] == 20

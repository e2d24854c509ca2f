from __future__ import annotations

import math

import pytest
import torch
from tests.studies.planted import fill, findings_of, judge, noise, outcomes
from tests.studies.planted_progress import planted

from longshort.reporting.intervals import Interval
from longshort.stability.probe import STRIDE
from longshort.studies.framework.study import Outcome
from longshort.studies.language.alarms import WARNING
from longshort.studies.language.arms import model_config
from longshort.studies.language.equal_progress import p_of_ratio, p_of_two
from longshort.studies.language.trial import probe_series
from longshort.studies.progress.chance import chance_slope
from longshort.studies.progress.design import ENOUGH, NEEDED, copying_step
from longshort.studies.progress.logits import DIVERGENCE, GROWTH, MITIGATION, RATIO, SOONER
from longshort.studies.progress.mechanism import MECHANISM
from longshort.studies.progress.needle import farthest_gain
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
        DIVERGENCE.id: NOT_MEASURED, RATIO.id: AGAINST, GROWTH.id: NOT_SHOWN, MITIGATION.id: NOT_SHOWN,
        SOONER.id: AGAINST, ENOUGH.id: SHOWN, NEEDED.id: NOT_SHOWN, MECHANISM.id: NOT_MEASURED,
        WARNING.id: NOT_MEASURED, REMEDIES.id: NOT_MEASURED,
    }  # fmt: skip


def test_an_arm_that_has_not_learned_leaves_claims_open(tmp_path):
    found = judge(STUDY, "laptop", planted(lambda trial: 0.3 if trial.arm == "MHSA" else 1.0), tmp_path)
    assert found[RATIO.id] == found[SOONER.id] == OPEN
    found = judge(STUDY, "laptop", planted(copies=False), tmp_path)
    assert found[ENOUGH.id] == found[NEEDED.id] == OPEN
    found = judge(STUDY, "laptop", planted(lambda trial: 0.3 if "no global" in trial.arm else 1.0), tmp_path)
    assert (found[ENOUGH.id], found[NEEDED.id]) == (SHOWN, OPEN)


def test_a_planted_ratio_of_1_to_25_is_shown(tmp_path):
    def logit(trial, loss):
        return (250.0 if trial.arm.startswith("MHSA") else 10.0) / loss

    assert judge(STUDY, "laptop", planted(logit=logit), tmp_path)[RATIO.id] == SHOWN


@pytest.mark.parametrize("mhsa", [180.0, 250.0, 1000.0])
def test_a_ratio_that_is_too_noisy_to_be_shown_is_partly_shown(tmp_path, mhsa):
    """Seeds differ by ten percent: 1/25 does not pass for 1/20, and is no less below 1 than 1/18 is."""

    def logit(trial, loss):
        return (mhsa if trial.arm.startswith("MHSA") else 10.0) * math.exp(10 * 0.01 * noise(trial)) / loss

    assert judge(STUDY, "laptop", planted(logit=logit), tmp_path)[RATIO.id] == (
        SHOWN if mhsa == 1000.0 else PARTLY
    )


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


def test_p_values_are_those_of_the_outcome():
    """Two losses barely below 1/20, three at half: the p-value is that of 1/20, not of 1."""
    barely, half = (Interval(math.log(ratio), math.log(ratio) - d, math.log(ratio) + d, 3) for ratio, d in (
        (0.0490, 0.019), (0.5, 0.01)
    ))  # fmt: skip
    at = [barely, barely, half, half, half]
    p_shown, p_partly = (
        p_of_two([p_of_ratio(one, outcome, 1 / 20) for one in at])
        for outcome in (Outcome.SHOWN, Outcome.PARTLY)
    )
    assert p_shown == pytest.approx(4 * barely.p_value(math.log(1 / 20))) and p_shown > 0.15
    assert p_partly < 1e-3
    assert p_of_ratio(half, Outcome.CONTRADICTED, 1 / 20) == 1.0


def test_a_length_that_stays_behind_leaves_growth_open_and_shows_the_others(tmp_path):
    by_length = STUDY.scales["overnight"].length_arms

    def result_of(trial):
        is_late = trial.settings["train"]["sequence_length"] == 2048 and trial.arm.startswith("MHSA")
        return planted(end=2.15 if is_late else 1.2, logit=lambda trial, loss: 9.0)(trial)

    trials = [
        arm.trial(3e-3, seed) for arms in by_length.values() for arm in arms.values() for seed in range(3)
    ]
    results = {trial.key: result_of(trial) for trial in trials}
    found = findings_of(STUDY, "overnight", range(3), results, tmp_path)
    growth = next(verdict for verdict in found.verdicts if verdict.claim is GROWTH)
    assert growth.outcome.value == outcomes(found)[MITIGATION.id] == OPEN
    assert "Losses that the runs of all lengths reach: 2.2; too few for a verdict. Slope" in growth.evidence
    assert "Without the other lengths, n = 256, 512, 1,024: Slope" in growth.evidence


def test_logits_that_grow_with_length(tmp_path):
    def logit(trial, loss):
        return trial.settings["train"]["sequence_length"] ** 0.3

    assert judge(STUDY, "laptop", planted(logit=logit), tmp_path)[GROWTH.id] == SHOWN

    def shrinking(trial, loss):
        return 1 / logit(trial, loss)

    assert judge(STUDY, "laptop", planted(logit=shrinking), tmp_path)[GROWTH.id] == AGAINST


def test_growth_by_the_number_of_logits_alone_is_none(tmp_path):
    def logit(trial, loss):
        return trial.settings["train"]["sequence_length"] ** 0.09

    assert judge(STUDY, "laptop", planted(logit=logit), tmp_path)[GROWTH.id] == NOT_SHOWN


@pytest.mark.parametrize(("lengths", "heads"), [((64, 256), 8), ((256, 2048), 2048)])
def test_the_growth_by_chance_is_that_of_drawn_logits(lengths, heads):
    generator = torch.Generator().manual_seed(0)

    def drawn(length):
        """Draw the largest range of all rows: of t numbers the largest, then the smallest."""
        draws, ranges = max(50, 16_000 // heads), []
        for row in range((length - 1) % STRIDE, length, STRIDE):
            u, v = torch.rand(2, draws, heads, generator=generator, dtype=torch.float64)
            largest = u ** (1 / (row + 1))
            smallest = largest * (1 - v ** (1 / row))
            ranges.append((torch.special.ndtri(largest) - torch.special.ndtri(smallest)).amax(1))
        return float(torch.stack(ranges).amax(0).mean())

    first, last = lengths
    wanted = math.log(drawn(last) / drawn(first)) / math.log(last / first)
    assert chance_slope(lengths, heads) == pytest.approx(wanted, abs=0.005)


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


def sizes_and_hiding(power, hidden, hidden_ls=1.0, power_ls=0.0):
    """The largest logit by head_dim, and its factor with hidden keys, for MHSA and LS."""

    def logit(trial, loss):
        is_mhsa = trial.arm.startswith("MHSA")
        head_dim = trial.settings["model"].get("head_dim", 16)
        factor = hidden if is_mhsa else hidden_ls
        return head_dim ** (power if is_mhsa else power_ls) * (
            factor if "hidden_keys" in trial.settings else 1.0
        )

    return logit


def one_part_each(trial, loss):
    """Smaller logits with wider heads at a loss of 2.2 alone, and with hidden keys at 2.1 alone."""
    if loss > 2.15:
        return sizes_and_hiding(-0.4, 1.0)(trial, loss)
    return sizes_and_hiding(0.0, 0.5 if loss > 2.05 else 1.0)(trial, loss)


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
        (sizes_and_hiding(-0.4, 2.0), NOT_SHOWN),  # one each way
        (sizes_and_hiding(0.4, 0.5), NOT_SHOWN),
        (sizes_and_hiding(0.0, 0.5), PARTLY),
        (sizes_and_hiding(-0.4, 1.0, power_ls=-0.4), NOT_SHOWN),  # wider heads do as much for LS
        (sizes_and_hiding(-0.4, 0.5, power_ls=-0.6), PARTLY),
        (lambda t, loss: sizes_and_hiding(-0.4, 0.5)(t, loss) if loss > 2.15 else 1.0, NOT_SHOWN),
        (one_part_each, NOT_SHOWN),
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
        ("LS, 8 × 8", OPEN),
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


def test_pairs_of_which_a_run_never_begins_to_learn_do_not_count(tmp_path):
    """At 6e-2 MHSA diverges; below, it alone never falls to 2.3."""

    def stuck(rates):
        def speed(trial):
            return 0.3 if trial.arm == "MHSA" and trial.settings["train"]["learning_rate"] in rates else 1.0

        return planted(speed, diverged=lambda trial: None if speed(trial) < 1 or trial.arm == "LS" else 700)

    results = fill(STUDY, "overnight", range(3), stuck(RATES[1:]))
    verdict = findings_of(STUDY, "overnight", range(3), results, tmp_path).verdicts[0]
    assert "Of 3 pairs that count" in verdict.evidence
    assert "In 9 of 12 pairs a run neither" in verdict.evidence
    assert verdict.evidence.endswith("nor began to learn: at 1.7e-2, 3e-2, 6e-2.")
    results = fill(STUDY, "overnight", range(3), stuck(RATES))
    assert findings_of(STUDY, "overnight", range(3), results, tmp_path).verdicts[0].outcome.value == OPEN


def test_divergence_and_alarms_wait_for_all_their_runs(tmp_path):
    def result_of(trial):
        return planted(diverged=lambda trial: 700 if trial.arm == "MHSA" else None)(trial)

    results = fill(STUDY, "overnight", range(3), result_of)
    assert outcomes(findings_of(STUDY, "overnight", range(3), results, tmp_path))[DIVERGENCE.id] == SHOWN
    del results[STUDY.scales["overnight"].stress_trials([2])["LS", 6e-2][0].key]
    found = outcomes(findings_of(STUDY, "overnight", range(3), results, tmp_path))
    assert found[DIVERGENCE.id] == found[WARNING.id] == NOT_MEASURED


def test_runs_that_never_learn_are_no_sound_ones(tmp_path):
    """All runs of MHSA diverge, and those of LS never learn."""
    result_of = planted(
        lambda trial: 1.0 if trial.arm.startswith("MHSA") else 0.3,
        diverged=lambda trial: 700 if trial.arm.startswith("MHSA") else None,
    )
    assert judge(STUDY, "overnight", result_of, tmp_path)[WARNING.id] == NOT_MEASURED


def test_claims_that_a_scale_does_not_test_are_named_and_do_not_count(tmp_path):
    results = fill(STUDY, "laptop", range(3), planted())
    found = {v.claim.id: v for v in findings_of(STUDY, "laptop", range(3), results, tmp_path).verdicts}
    assert found[MECHANISM.id].evidence == found[REMEDIES.id].evidence == "Not part of this scale."
    half = dict(list(results.items())[: len(results) // 2])
    assert "Not part of" not in findings_of(STUDY, "laptop", range(3), half, tmp_path).verdicts[3].evidence


def test_trials_that_are_not_done_raise_the_p_values(tmp_path):
    """Beside the pair alone, nine claims wait; with everything done, fewer tests are made."""
    results = fill(STUDY, "overnight", range(3), planted(lambda t: 1.3 if t.arm.startswith("LS") else 1.0))
    pair = {
        trial.key for arm in STUDY.scales["overnight"].main for trial in map(arm.trial, [3e-3] * 3, range(3))
    }
    part = {key: result for key, result in results.items() if key in pair}
    early, late = (
        next(
            v.p
            for v in findings_of(STUDY, "overnight", range(3), some, tmp_path).verdicts
            if v.claim is SOONER
        )
        for some in (part, results)
    )
    assert early is not None and late is not None and early > late > 0


def test_one_seed_decides_nothing(tmp_path):
    results = fill(STUDY, "laptop", range(1), planted())
    found = findings_of(STUDY, "laptop", range(1), results, tmp_path)
    told = {verdict.claim.id: verdict.evidence for verdict in found.verdicts}
    for claim in (RATIO, SOONER, GROWTH, MITIGATION, ENOUGH, NEEDED):
        assert told[claim.id] == "One seed has no interval." and outcomes(found)[claim.id] == NOT_MEASURED


def test_alarms_are_judged_on_the_runs_that_may_diverge(tmp_path):
    def high_rates(trial):
        return 700 if trial.settings["train"]["learning_rate"] >= 3e-2 else None

    found = judge(STUDY, "overnight", planted(diverged=high_rates), tmp_path)
    assert found[WARNING.id] == NOT_MEASURED  # no rate has runs of both kinds

    def some(trial):
        return 700 if trial.seed and trial.settings["train"]["learning_rate"] > 1e-2 else None

    found = judge(STUDY, "overnight", planted(diverged=some), tmp_path)
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
    assert list(found) == ["MHSA", "LS", "LS, no global head", "MHSA, n = 256", "LS, n = 256"]
    assert {"constant_loss", "validation_loss", "max_logit at 2.0", "row_range at 1.3"} <= set(found["LS"])
    interval = found["LS"]["max_logit at 2.0"]
    assert 9 < interval.low < interval.mean < interval.high < 11


def tables(result_of, folder, seeds=range(3)):
    results = fill(STUDY, "overnight", seeds, result_of)
    found = findings_of(STUDY, "overnight", seeds, results, folder)
    return {one.heading: one.table.rows for one in found.sections if one.table}


def test_what_is_reported_beside_the_claims(tmp_path):
    found = tables(planted(), tmp_path)
    clock = {row[0]: row[1:] for row in found["Transition clock"]}
    assert {"MHSA", "LS + RoPE", "MHSA, n = 2048"} <= clock.keys()
    assert all(cell != "–" for cell in clock["MHSA"])
    assert [row[0] for row in found["Rotary positions, over seeds"]][:3] == [
        "LS + RoPE, largest logit", "LS + RoPE, row range", "LS + RoPE, tokens"
    ]  # fmt: skip
    assert found["Needle"] == [("MHSA", "0.25"), ("LS", "0.25"), ("LS, no global head", "0.25")]


def test_heads_are_shown_by_kind(tmp_path):
    def result_of(trial):
        result = planted()(trial)
        if "probe" in result:
            steps = len(result["probe"]["step"])
            result["probe"] |= {
                f"max_logit_layer_{layer}_head_{head}": [1.0 + layer + head] * steps
                for layer in range(2)
                for head in range(4)
            }
        return result

    rows = {row[0]: row[1] for row in tables(result_of, tmp_path)["By kind of head"]}
    assert rows == {
        "MHSA, global heads": "5", "LS, global heads": "5", "LS, local heads": "4",
        "LS, no global head, local heads": "5",
    }  # fmt: skip


def test_the_first_of_any_seeds_runs_long_with_other_positions():
    trials = [trial for trial in STUDY.plan("overnight", [7, 8, 9], {}).trials if "RoPE" in trial.arm]
    steps = {(trial.seed, trial.settings["train"]["steps"]) for trial in trials}
    assert steps == {(7, 10_000), (8, 3000), (9, 3000)}


def test_further_seeds_of_the_pair_count_when_all_of_them_are_there(tmp_path):
    results = fill(STUDY, "overnight", range(5), planted())
    found = findings_of(STUDY, "overnight", range(5), results, tmp_path)
    assert found.tested == "n = 1,024, 82M tokens, 5 seeds"
    evidence = {verdict.claim.id: verdict.evidence for verdict in found.verdicts}
    assert "Gain of a needle" in evidence[ENOUGH.id] and "on the last 3 seeds" in evidence[ENOUGH.id]
    bias = next(section.table for section in found.sections if section.heading == "Rounding: signed bias")
    assert bias is not None and bias.rows[0][0] == "MHSA, Q"
    last = STUDY.scales["overnight"].main[0].trial(3e-3, 4)
    del results[last.key]
    found = findings_of(STUDY, "overnight", range(5), results, tmp_path)
    assert found.tested == "n = 1,024, 82M tokens, 3 seeds"
    assert outcomes(found)[RATIO.id] == AGAINST


def test_the_farthest_needle_is_at_the_beginning_of_the_longest_text():
    cells = [
        {"length": length, "depth": depth, "gain": gain}
        for length, depth, gain in ((64, 0.1, 1.0), (128, 0.9, 2.0), (128, 0.1, 3.0), (128, 0.5, 4.0))
    ]
    assert farthest_gain({"needle": cells}) == 3.0


def test_needles_stand_beside_the_design_claims(tmp_path):
    found = findings_of(STUDY, "laptop", range(3), fill(STUDY, "laptop", range(3), planted()), tmp_path)
    told = {verdict.claim.id: verdict.evidence for verdict in found.verdicts}
    for claim, other in ((ENOUGH, "MHSA"), (NEEDED, "LS, no global head")):
        assert f"on the last 3 seeds: {other} 0.25, LS 0.25." in told[claim.id]


def test_the_plan_goes_from_the_pair_to_lengths_rates_audits_and_further_seeds():
    """Parts in the order in which they are decided."""

    def part(trial):
        if trial.settings.keys() & {"audit", "needle"}:
            return next(iter(trial.settings.keys() & {"audit", "needle"}))
        train = trial.settings["train"]
        if "alarms" in train:
            return "rates"
        if train.get("stop_at_loss"):
            return "lengths" if "hidden" not in trial.arm and "×" not in trial.arm else "mechanism"
        return f"{'RoPE' if 'RoPE' in trial.arm else trial.arm}, {trial.seed}"

    parts = list(dict.fromkeys(map(part, STUDY.plan("overnight", range(5), {}).trials)))
    order = [
        "MHSA, 0", "RoPE, 0", "MHSA, 2", "lengths", "rates", "audit", "MHSA, 3", "MHSA, 4", "needle",
        "RoPE, 1", "mechanism", "MHSA + QK-norm, 0", "MHSA, fp32, 0", "MHSA, no weight decay, 0",
    ]  # fmt: skip
    assert [one for one in parts if one in order] == order


def test_the_plan_runs_the_first_seed_first():
    trials = STUDY.plan("overnight", range(3), {}).trials
    assert len({trial.key for trial in trials}) == len(trials) == 168
    assert len({trial.key for trial in STUDY.plan("overnight", range(5), {}).trials}) == 174
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
        ([[1, 5.0], [5, 4.0], [10, 4.0], [20, 3.6], [30, 3.51]], 30, None),
        ([], 10, None),
    ],
    ids=[
        "after the constant rate", "within it", "below the highest value before", "before it learns",
        "not measured",
    ],
)  # fmt: skip
def test_copying_begins_where_the_loss_has_dropped(curve, constant_until, step):
    result = {
        "constant_until": constant_until, "copying_curve": curve, "validation_curve": [[1, 3.0], [5, 2.2]]
    }  # fmt: skip
    assert copying_step(result) == step
    assert copying_step({**result, "validation_curve": [[1, 3.0], [40, 2.4]]}) is None


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

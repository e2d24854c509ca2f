from __future__ import annotations

import pytest
from tests.studies.planted import fill, outcomes

from longshort.studies.framework.study import Outcome, Workplace
from longshort.studies.latency import GPT2, SAVING, Latency, saving_outcome

STUDY = Latency()
SEEDS = range(1)


def times(ls, mhsa, length=8192):
    return {length: {"LS": ls, "MHSA": mhsa, GPT2: [10.0 * value for value in mhsa]}}


@pytest.mark.parametrize(
    ("seconds", "outcome"),
    [
        (times([0.5, 0.6], [1.0, 1.1]), Outcome.SHOWN),
        (times([0.5, 0.6], [1.0, 1.1], length=65_536), Outcome.PARTLY),
        (times([0.5, 0.9], [1.0, 1.1]), Outcome.PARTLY),
        (times([0.5, 1.05], [1.0, 1.1]), Outcome.NOT_SHOWN),
        (times([1.0, 1.0], [1.0, 1.0]), Outcome.NOT_SHOWN),
        (times([1.2, 1.3], [1.0, 1.1]), Outcome.CONTRADICTED),
        (times([1.2, 1.3], [1.0, 1.1]) | times([0.5, 0.6], [1.0, 1.1], length=64), Outcome.SHOWN),
    ],
)
def test_the_rule_asks_for_the_saving_in_every_pass(seconds, outcome):
    assert saving_outcome(seconds) is outcome


def test_the_faster_baseline_counts():
    seconds = {8192: {"LS": [0.6, 0.6], "MHSA": [1.0, 1.0], GPT2: [0.7, 0.7]}}
    assert saving_outcome(seconds) is Outcome.PARTLY


def planted(trial):
    return {
        "flops": {"LS": 1.0, "MHSA": 2.0},
        "pairs": {"LS": 1, "MHSA": 10, GPT2: 10},
        "timing": {
            "seconds": {"LS": [0.5, 0.51], "MHSA": [1.0, 1.1], GPT2: [1.2, 1.2]},
            "device": "cpu, 1 threads",
            "attention_seconds": {"LS": [0.1, 0.1], "MHSA": [0.7, 0.7], GPT2: [0.8, 0.8]},
        },
    }


def test_the_saving_is_told_by_length(tmp_path):
    found = STUDY.findings("laptop", SEEDS, fill(STUDY, "laptop", SEEDS, planted), tmp_path)
    assert outcomes(found) == {SAVING.id: "shown"}
    assert "n = 8,192: 52%" in found.verdicts[0].evidence
    section = found.sections[0]
    assert section.figures[0].file.is_file() and section.table is not None
    # MHSA: 0.7 · (1 - 1/10) of 1.05; GPT-2: 0.8 · 0.9 of 1.2
    assert section.table.rows[0][4:] == ("52%", "60%", "58%", "60%", "50%")


@pytest.mark.parametrize("lost", ["a trial", "the timing"])
def test_nothing_is_judged_without_all_times(tmp_path, lost):
    results = fill(STUDY, "laptop", SEEDS, planted)
    last = next(reversed(results))
    results[last] = {"flops": results[last]["flops"], "timing": {}}
    if lost == "a trial":
        del results[last]
    assert outcomes(STUDY.findings("laptop", SEEDS, results, tmp_path)) == {
        SAVING.id: "not measured at this scale"
    }


def test_both_models_take_as_many_turns(tmp_path):
    trial, *_ = STUDY.plan("smoke", SEEDS, {}).trials
    result = STUDY.run(trial, Workplace(tmp_path, "stdlib"))
    seconds = result["timing"]["seconds"]
    assert {len(values) for values in seconds.values()} == {trial.settings["repeats"]}
    assert min(min(values) for values in seconds.values()) > 0
    assert result["pairs"]["LS"] < result["pairs"]["MHSA"] == result["pairs"][GPT2]
    assert result["flops"]["LS"] < result["flops"]["MHSA"]

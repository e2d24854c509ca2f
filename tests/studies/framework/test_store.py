from __future__ import annotations

import json

import pytest

from longshort.studies.framework.store import RESULTS_FILE, TIMING_FILE, ResultsFile
from longshort.studies.framework.study import Trial

TRIALS = [Trial("a", 0, {"x": 1}), Trial("a", 1, {"x": 2}), Trial("b", 0, {"x": 3})]


def add(folder, trials, plan=TRIALS):
    file = ResultsFile(folder)
    file.order(plan)
    for trial in trials:
        file.add(trial, {"y": trial.settings["x"] * 2, "lost": float("inf"), "timing": {"seconds": 0.1}})
    return file


def test_the_file_does_not_depend_on_the_order_of_finishing(tmp_path):
    add(tmp_path / "one", TRIALS)
    add(tmp_path / "two", TRIALS[::-1])
    files = [(tmp_path / name / RESULTS_FILE).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    lines = [json.loads(line) for line in files[0].splitlines()]
    assert [line["settings"]["x"] for line in lines] == [1, 2, 3]
    assert lines[0]["result"] == {"y": 2, "lost": None}


def test_times_are_kept_apart(tmp_path):
    file = add(tmp_path, TRIALS)
    assert "seconds" not in (tmp_path / RESULTS_FILE).read_text()
    assert "seconds" in (tmp_path / TIMING_FILE).read_text()
    assert ResultsFile(tmp_path).results == file.results
    assert file.results[TRIALS[0].key]["timing"] == {"seconds": 0.1}


def test_results_outside_the_plan_are_kept(tmp_path):
    add(tmp_path, TRIALS)
    add(tmp_path, [], plan=TRIALS[:1])
    assert len(ResultsFile(tmp_path).results) == 3
    assert json.loads((tmp_path / RESULTS_FILE).read_text().splitlines()[0])["settings"] == {"x": 1}


def test_a_trial_is_named_by_its_settings_alone():
    assert Trial("a", 0, {"x": 1, "y": 2}).key == Trial("b", 5, {"y": 2, "x": 1}, work=7).key
    assert Trial("a", 0, {"x": 1}).key != Trial("a", 0, {"x": 2}).key


@pytest.mark.parametrize("line", ["{", "[]", '{"seed": 1}'])
def test_a_damaged_file_is_named(tmp_path, line):
    (tmp_path / RESULTS_FILE).write_text(f"{line}\n")
    with pytest.raises(ValueError, match=rf"{RESULTS_FILE}, line 1"):
        ResultsFile(tmp_path)

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from tests.studies.framework.toy_study import Toy

from longshort.studies.framework import runner
from longshort.studies.framework.runner import StudyProgress, run_trials
from longshort.studies.framework.store import RESULTS_FILE, ResultsFile
from longshort.studies.framework.study import Workplace


def run(folder, study=None, jobs=2, progress=None, seeds=range(3)):
    assert run_until(None, folder, study, jobs, progress, seeds)
    return ResultsFile(folder / "toy")


def run_until(ends_at, folder, study=None, jobs=2, progress=None, seeds=range(3)):
    work = {"toy": (study or Toy(), ResultsFile(folder / "toy"))}
    place = Workplace(folder, "stdlib")
    return run_trials(work, "smoke", {"toy": seeds}, place, jobs, progress, ends_at)


class Watch(StudyProgress):
    def __init__(self):
        self.states, self.finished = [], []

    def on_state(self, state):
        self.states.append(state)

    def on_result(self, study, trial, seconds):
        self.finished.append(trial.arm)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a study that is done, and what was reported."""
    folder, watch = tmp_path_factory.mktemp("whole"), Watch()
    run(folder, progress=watch)
    assert not multiprocessing.active_children()
    return folder, watch


def test_trials_that_follow_from_others_are_run_too(whole):
    folder, watch = whole
    results = ResultsFile(folder / "toy").results
    assert sorted(result["double"] for result in results.values()) == [0, 2, 4, 8]
    assert watch.finished[-1] == "again"
    last = watch.states[-1]
    assert (last.done, last.known, last.running) == ({"toy": 4}, {"toy": 4}, [])
    assert last.seconds_left == 0


def test_workers_are_processes_with_one_thread_each(whole):
    results = ResultsFile(whole[0] / "toy").results.values()
    assert {result["threads"] for result in results} == {"1"}
    pids = {result["timing"]["pid"] for result in results}
    assert os.getpid() not in pids


def test_what_is_finished_is_not_run_again(whole):
    folder, watch = whole[0], Watch()
    before = (folder / "toy" / RESULTS_FILE).read_bytes()
    run(folder, Toy(fails=1), progress=watch)
    assert watch.finished == []
    assert (folder / "toy" / RESULTS_FILE).read_bytes() == before


def test_a_failure_names_the_trial_and_keeps_what_is_finished(whole, tmp_path):
    with pytest.raises(ChildProcessError, match=r"toy, double, seed 2 failed:[\s\S]*this seed fails"):
        run(tmp_path, Toy(fails=2), jobs=1)
    assert len(ResultsFile(tmp_path / "toy").results) == 2
    assert len(run(tmp_path, jobs=1).results) == 4
    ours, theirs = ((folder / "toy" / RESULTS_FILE).read_bytes() for folder in (tmp_path, whole[0]))
    assert ours == theirs


def test_a_killed_process_is_an_error_not_a_hang(tmp_path):
    with pytest.raises(ChildProcessError, match="was killed"):
        run(tmp_path, Toy(dies=0), jobs=1)


def test_ctrl_c_ends_the_workers(tmp_path):
    class Interrupt(StudyProgress):
        def on_state(self, state):
            if state.done["toy"] == 2:
                signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Toy(sleeps=2), progress=Interrupt())
    assert not multiprocessing.active_children()
    assert len(ResultsFile(tmp_path / "toy").results) == 2


def test_the_end_of_the_time_ends_the_workers_and_keeps_what_is_finished(tmp_path, monkeypatch):
    class OneDone(Watch):
        def on_result(self, study, trial, seconds):
            super().on_result(study, trial, seconds)
            monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 10.0))

    watch = OneDone()
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 9.0))
    assert not run_until(10.0, tmp_path, Toy(sleeps=1), jobs=1, progress=watch)
    assert watch.finished == ["double"]
    assert not multiprocessing.active_children()
    assert len(run(tmp_path, jobs=1).results) == 4


def test_trials_that_end_with_the_time_are_all_done(tmp_path, monkeypatch):
    class AllDone(Watch):
        def on_state(self, state):
            if state.done["toy"] == state.known["toy"]:
                monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 10.0))

    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 9.0))
    assert run_until(10.0, tmp_path, jobs=1, progress=AllDone())
    assert run_until(0.0, tmp_path)  # nothing is left to do

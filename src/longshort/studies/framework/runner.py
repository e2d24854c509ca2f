"""The runner of studies: trials run side by side, in one process per core, and stop cleanly."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from longshort.studies.framework.processes import ended_by_signals, ignore_interrupts
from longshort.studies.framework.store import ResultsFile
from longshort.studies.framework.study import Plan, Scale, Study, Trial, Workplace

_SECONDS_BETWEEN_LOOKS = 0.5
_RECENT = 8  # finished trials from which the time left is estimated


@dataclass(frozen=True)
class Running:
    """A running trial, and the share of it that is done, 0 ... 1."""

    study: str
    trial: Trial
    share: float


@dataclass(frozen=True)
class State:
    """The state of the studies at one moment.

    Attributes:
        done, known: number of trials of each study; more become known as sweeps are done.
        running: running trials.
        seconds_left: an estimate; None before the first trial is done.
    """

    done: Mapping[str, int]
    known: Mapping[str, int]
    running: Sequence[Running]
    seconds_left: float | None


class StudyProgress:
    """Callbacks of the runner; override those that you need."""

    def on_state(self, state: State) -> None:
        """Called about twice a second."""

    def on_result(self, study: str, trial: Trial, seconds: float) -> None:
        """Called when a trial is done."""


def run_trials(
    studies: Mapping[str, tuple[Study, ResultsFile]],
    scale: Scale,
    seeds: Mapping[str, Sequence[int]],
    workplace: Workplace,
    jobs: int,
    progress: StudyProgress | None = None,
    ends_at: float | None = None,
) -> bool:
    """Run all trials that are planned and not done yet, study by study, `jobs` trials at once.

    Ctrl-C, SIGTERM and the end of the time stop the workers; trainings write a checkpoint first. Finished
    trials are kept.

    Args:
        studies: the studies and the files of their results, by name.
        scale: scale of all of them.
        seeds: seeds of each study.
        workplace: the environment of the trials.
        jobs: number of processes.
        progress: reports what happens.
        ends_at: the end of the time, on the clock `time.monotonic`; None: there is none.

    Returns:
        Whether all trials are done; False only if the time was up before.

    Raises:
        ChildProcessError: a trial failed, or its process was killed; the message holds its error.
        OSError: results could not be written.
    """
    queue = _Queue(studies, scale, seeds)
    if not queue.has_trials:
        return True
    for study, _ in studies.values():
        study.prepare(workplace)
    progress = progress or StudyProgress()
    with ended_by_signals(), _workers(jobs) as workers:
        while True:
            if ends_at is not None and time.monotonic() >= ends_at and queue.has_trials:
                return False
            for worker in workers:
                following = queue.next_trial() if worker.running is None else None
                if following is not None:
                    name, trial = following
                    worker.start(studies[name][0], name, trial, workplace)
            busy = [worker for worker in workers if worker.running is not None]
            if not busy:
                return True
            wait([worker.connection for worker in busy], timeout=_SECONDS_BETWEEN_LOOKS)
            for worker in busy:
                finished = worker.listen()
                if finished is not None:
                    running, result, seconds = finished
                    queue.finish(running, result, seconds)
                    progress.on_result(running.study, running.trial, seconds)
            progress.on_state(queue.state([worker.running for worker in workers if worker.running], jobs))


class _Queue:
    """The trials that are planned and not done yet."""

    def __init__(
        self,
        studies: Mapping[str, tuple[Study, ResultsFile]],
        scale: Scale,
        seeds: Mapping[str, Sequence[int]],
    ) -> None:
        self._studies, self._seeds = studies, seeds
        self._scale: Scale = scale
        self._results = {name: file.results for name, (_, file) in studies.items()}
        self._started: set[str] = set()  # keys
        self._finished: deque[tuple[float, float]] = deque(maxlen=_RECENT)  # work and seconds
        self._plans = {name: self._plan(name) for name in studies}

    def _plan(self, name: str) -> Plan:
        study, file = self._studies[name]
        plan = study.plan(self._scale, self._seeds[name], self._results[name])
        file.order(plan.trials)
        return plan

    def _left(self, name: str) -> list[Trial]:
        return [trial for trial in self._plans[name].trials if trial.key not in self._results[name]]

    @property
    def has_trials(self) -> bool:
        return any(map(self._left, self._plans))

    def next_trial(self) -> tuple[str, Trial] | None:
        for name in self._plans:
            for trial in self._left(name):
                if trial.key not in self._started:
                    self._started.add(trial.key)
                    return name, trial
        return None

    def finish(self, running: Running, result: dict[str, Any], seconds: float) -> None:
        name, trial = running.study, running.trial
        self._started.remove(trial.key)
        self._studies[name][1].add(trial, result)
        self._results[name] = self._studies[name][1].results
        self._plans[name] = self._plan(name)
        self._finished.append((trial.work, seconds))

    def state(self, running: Sequence[Running], jobs: int) -> State:
        done, known, work_left = {}, {}, 0.0
        for name, plan in self._plans.items():
            left = self._left(name)
            known[name] = len(plan.trials)
            done[name] = known[name] - len(left)
            work_left += sum(trial.work for trial in left) + plan.later_work
        work_left -= sum(worker.trial.work * worker.share for worker in running)
        seconds_left = None
        if self._finished:
            work_done, seconds = map(sum, zip(*self._finished, strict=True))
            seconds_left = work_left / jobs * seconds / work_done
        return State(done, known, running, seconds_left)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    running: Running | None = None

    def start(self, study: Study, name: str, trial: Trial, workplace: Workplace) -> None:
        self.running = Running(name, trial, 0.0)
        try:
            self.connection.send((study, trial, workplace))
        except OSError:
            raise self._killed() from None

    def listen(self) -> tuple[Running, dict[str, Any], float] | None:
        """Read the worker's messages; return its result and seconds once the trial is done."""
        running = self.running
        assert running is not None
        try:
            while self.connection.poll():
                kind, content, seconds = self.connection.recv()
                if kind == "progress":
                    self.running = replace(running, share=content)
                elif kind == "failed":
                    raise ChildProcessError(f"{_describe(running)} failed:\n{content}")
                else:
                    self.running = None
                    return running, content, seconds
        except (EOFError, ConnectionError):
            raise self._killed() from None
        return None

    def _killed(self) -> ChildProcessError:
        assert self.running is not None
        return ChildProcessError(f"the process of {_describe(self.running)} was killed")


def _describe(running: Running) -> str:
    return f"{running.study}, {running.trial.arm}, seed {running.trial.seed}"


@contextmanager
def _workers(count: int) -> Iterator[list[_Worker]]:
    """Start processes that wait for trials; however the block ends, none of them outlives it."""
    context = multiprocessing.get_context("spawn")  # forked children of torch may hang
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a larger thread pool costs time even if it is not used
    workers = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        yield workers
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
        for worker in workers:
            if worker.running is not None:
                worker.process.terminate()  # a training writes its checkpoint
            worker.connection.close()  # ends a worker that waits for a trial
        for worker in workers:
            worker.process.join()


def _work(connection: Connection) -> None:
    ignore_interrupts()
    while True:
        try:
            study, trial, workplace = connection.recv()
        except (EOFError, ConnectionError):
            return
        torch.set_num_threads(1)
        started = time.perf_counter()

        def report(share: float) -> None:
            with suppress(OSError):  # the parent is gone; the trial ends by itself
                connection.send(("progress", share, 0.0))

        try:
            result = study.run(trial, replace(workplace, report_progress=report))
            message = ("done", result, time.perf_counter() - started)
        except Exception:
            message = ("failed", traceback.format_exc(), 0.0)
        with suppress(OSError):
            connection.send(message)

"""Trials in the process of the test: starting others takes much longer than the smallest trials."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

from longshort.studies.framework.runner import StudyProgress
from longshort.studies.framework.store import ResultsFile
from longshort.studies.framework.study import Scale, Study, Workplace


def run_here(
    studies: Mapping[str, tuple[Study, ResultsFile]],
    scale: Scale,
    seeds: Mapping[str, Sequence[int]],
    workplace: Workplace,
    jobs: int,
    progress: StudyProgress | None = None,
    ends_at: float | None = None,
) -> bool:
    """Run all trials that are planned and not done yet, as `run_trials` does in other processes."""
    for name, (study, file) in studies.items():
        is_ready = False
        while True:
            plan = study.plan(scale, seeds[name], file.results)
            file.order(plan.trials)
            pending = [trial for trial in plan.trials if trial.key not in file.results]
            if not pending:
                break
            if not is_ready:
                study.prepare(workplace)
                is_ready = True
            for trial in pending:
                sent = pickle.loads(pickle.dumps((study, trial, workplace)))  # as another process gets it
                file.add(trial, sent[0].run(sent[1], sent[2]))
                if progress is not None:
                    progress.on_result(name, trial, 1.0)
    return True

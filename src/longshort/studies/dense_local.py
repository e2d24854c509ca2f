"""The study `dense-local`, the paper's figure 2: global and local attention fit a dense random band.

Trials are single fits. The plan: a sweep of learning rates for each arm on the first seed; then each arm at
its best rate on all seeds, and, where the verdicts rest on it, at the next lower rate too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longshort.studies.dense_local_arms import (
    frontier_trials,
    illustrated_pair,
    illustration,
    pairs,
    sweep,
    trial_of,
)
from longshort.studies.dense_local_findings import find
from longshort.studies.dense_local_layer import run_layer_fit
from longshort.studies.dense_local_task import Fit, run_fit
from longshort.studies.dense_local_verdicts import CLAIMS
from longshort.studies.study import Findings, Plan, Results, Scale, Study, Trial, Workplace

_SEEDS: Mapping[Scale, int] = {"smoke": 2, "laptop": 3, "overnight": 5, "paper": 5}


class DenseLocal(Study):
    """A dense random band, fitted by global and by local attention (figure 2)."""

    name = "dense-local"
    title = "Dense local dependencies (figure 2)"
    claims = CLAIMS

    def default_seeds(self, scale: Scale) -> int:
        return _SEEDS[scale]

    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        found: dict[str, Trial] = {}
        later_work = 0.0
        for arm, rates in _arms(scale).items():
            search = sweep(arm, results, seeds[0])
            known = [trial_of(arm, rung, seeds[0]) for rung in search.rungs]
            if search.best is None:
                later_work += (len(seeds) - 1) * rates * known[0].work
            else:
                known += [
                    trial_of(arm, search.best - lower, seed) for lower in range(rates) for seed in seeds
                ]
            found |= {trial.key: trial for trial in known}
        pair = illustrated_pair(scale)
        for arm in (pair.local, pair.other):
            best = sweep(arm, results, seeds[0]).best
            if best is None:
                later_work += trial_of(arm, 0, 0).work
            else:
                drawn = trial_of(illustration(arm), best, seeds[0])
                found[drawn.key] = drawn
        found |= {trial.key: trial for trial in frontier_trials(scale, seeds[0])}
        return Plan(list(found.values()), later_work)

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        fit = Fit(**trial.settings)
        run = run_fit if fit.form == "free" else run_layer_fit
        return run(fit, str(workplace.torch_device), workplace.report_progress)

    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        return find(scale, seeds, results, folder)


def _arms(scale: Scale) -> dict[Fit, int]:
    """Each arm, and at how many rates it is run on all seeds."""
    arms: dict[Fit, int] = {}
    for pair in pairs(scale):
        for arm in (pair.local, pair.other):
            arms[arm] = max(arms.get(arm, 1), 2 if pair.topic == "grid" else 1)
    return arms

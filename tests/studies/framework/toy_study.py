"""A study of a thousandth of a second a trial: what the runner does with it is known."""

from __future__ import annotations

import os
import time

from longshort.studies.framework.study import Claim, Findings, Outcome, Plan, Study, Trial, Verdict

CLAIM = Claim("toy", "Twice a number is more.", "It is less.", "Shown if all doubles are larger.")


class Toy(Study):
    """Doubles of the seeds; then one more trial, which is known only when these are done."""

    name = "toy"
    title = "Toy"
    claims = (CLAIM,)

    def __init__(self, fails=None, dies=None, sleeps=None):
        self.fails, self.dies, self.sleeps = fails, dies, sleeps

    def default_seeds(self, scale):
        return 3

    def plan(self, scale, seeds, results):
        trials = [Trial("double", seed, {"seed": seed}) for seed in seeds]
        if any(trial.key not in results for trial in trials):
            return Plan(trials, later_work=1.0)
        best = max(results[trial.key]["double"] for trial in trials)
        return Plan([*trials, Trial("again", 0, {"seed": best})])

    def run(self, trial, workplace):
        seed = trial.settings["seed"]
        if seed == self.fails:
            raise ValueError("this seed fails")
        if seed == self.dies:
            os._exit(9)
        if seed == self.sleeps:
            time.sleep(60)
        workplace.report_progress(0.5)
        threads = os.environ["OMP_NUM_THREADS"]
        return {"double": 2 * seed, "lost": float("nan"), "threads": threads, "timing": {"pid": os.getpid()}}

    def findings(self, scale, seeds, results, folder):
        return Findings([Verdict(CLAIM, Outcome.SHOWN, f"{len(results)} results.")], [])

"""The interface of a study: trials to run, claims to judge, and findings.

A study states its claims and the rule of each verdict before anything runs. Its plan depends only on the
results so far, so a study that was stopped resumes where it was: for example, the sweeps determine the rates
of the main trials. Findings depend on results alone too.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from longshort.reporting.intervals import Interval
from longshort.reporting.page import Section

Scale = Literal["smoke", "laptop", "overnight", "gpu", "paper"]
"""The scales; few studies have all of them. smoke: only tests that the study runs, in seconds. laptop: the
trials that decide the verdicts, within about 90 minutes a study on 2 cores. overnight: controls and
interventions too, 3 to 5 seeds. gpu: the author's small model for minutes on one GPU. paper: the
author's sizes, for GPUs."""


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        arm: name of the arm, such as "MHSA"; trials of one arm differ in seed or learning rate.
        seed: trials of different arms with the same seed are pairs.
        settings: everything that determines the result, seed included; JSON.
        work: estimate of its cost, in a unit common to the study's trials, such as FLOPs.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    work: float = field(default=1.0, compare=False)

    @property
    def key(self) -> str:
        """A hash of the settings, by which results are found."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


Results = Mapping[str, Mapping[str, Any]]
"""Results of finished trials by `Trial.key`, JSON; numbers that were not finite are None."""


_Name = TypeVar("_Name")


def finished(
    trials: Mapping[_Name, Sequence[Trial]], results: Results
) -> dict[_Name, list[Mapping[str, Any]]]:
    """Collect the results of the groups of trials of which all are done."""
    return {
        name: [results[trial.key] for trial in group]
        for name, group in trials.items()
        if all(trial.key in results for trial in group)
    }


@dataclass(frozen=True)
class Plan:
    """The trials that are known by now.

    Attributes:
        trials: trials, in the order in which they are run and written.
        later_work: work of the trials that are known only after these, for the estimate of the time left.
    """

    trials: Sequence[Trial]
    later_work: float = 0.0


def unique(trials: Iterable[Trial], keep: Literal["first", "last"] = "last") -> list[Trial]:
    """Drop repeated trials, keeping the place of each one's first or last occurrence."""
    trials = list(trials)
    if keep == "first":
        return list({trial.key: trial for trial in trials}.values())
    return list({trial.key: trial for trial in reversed(trials)}.values())[::-1]


class Outcome(Enum):
    """The outcome of a study for one claim."""

    SHOWN = "shown"
    PARTLY = "partly shown"
    NOT_SHOWN = "not shown at this scale"
    CONTRADICTED = "contradicted at this scale"
    ILLUSTRATED = "illustrated"
    NOT_MEASURED = "not measured at this scale"
    NOT_REACHED = "open: not reached"

    @property
    def is_claim(self) -> bool:
        """Whether it says something for or against the claim, and so can be wrong by chance."""
        return self in (Outcome.SHOWN, Outcome.PARTLY, Outcome.CONTRADICTED)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, or a question of ours.

    Attributes:
        id: the paper's figure or table, such as "F2c", or a word for questions of ours.
        statement: the statement itself.
        falsifier: results that would be evidence against it.
        rule: conditions for each outcome; fixed before the trials are run.
        paper: the paper's number, or its finding in a few words; empty for questions of ours.
    """

    id: str
    statement: str
    falsifier: str
    rule: str
    paper: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome for a claim.

    Attributes:
        claim: the claim.
        outcome: how it stands.
        evidence: the numbers that the outcome rests on, in words.
        p: p-value of the test behind the outcome, after `holm` the corrected one; None if there is none.
        partly_p: p-value with which a claim that is shown is at least partly shown, if its rule has that.
        here: the numbers of the evidence that say most; empty: all of it.
        tested: how far the claim was tested, if not as far as the study's other claims.
    """

    claim: Claim
    outcome: Outcome
    evidence: str
    p: float | None = None
    here: str = ""
    tested: str = ""
    partly_p: float | None = None


def not_measured(claim: Claim, reason: str = "The trials are not done.") -> Verdict:
    """Return the verdict on a claim for which there are not enough trials."""
    return Verdict(claim, Outcome.NOT_MEASURED, reason)


@dataclass(frozen=True)
class Findings:
    """The results of a study, judged and drawn.

    Attributes:
        verdicts: one per claim of the study.
        sections: sections of the report.
        predictions: 95 % prediction intervals of another seed's value, by arm and quantity.
        tested: how far the claims were tested: "n = 1,024, 82M tokens, 3 seeds".
    """

    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    predictions: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    tested: str = ""


def _ignore_progress(_share: float) -> None:  # a lambda cannot be sent to another process
    pass


@dataclass(frozen=True)
class Workplace:
    """The environment of trials: folder, corpus and hardware.

    Attributes:
        folder: the folder of all studies of one scale, with the corpora and training runs that they share.
        source: the corpus, as for `longshort data`.
        tokenizer: "bytes" or "bpe" (10,000 pieces, as in the paper).
        device: "cpu", "cuda" or "auto".
        report_progress: called with the share of the trial that is done, 0 ... 1.
    """

    folder: Path
    source: str
    tokenizer: str = "bytes"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    report_progress: Callable[[float], None] = _ignore_progress

    @property
    def torch_device(self) -> torch.device:
        """Return the device; "auto" is a GPU if there is one."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Study(ABC):
    """A figure or table of the paper, or a question of ours, as an experiment.

    Attributes:
        name: name on the command line.
        title: title in the report.
        claims: the claims to judge; none for controls beside another study.
        scales: the sizes of each scale that the study has, including the number of seeds.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    claims: ClassVar[Sequence[Claim]]
    scales: ClassVar[Mapping[Scale, Any]]

    def default_seeds(self, scale: Scale) -> int:
        """Return the number of seeds of a scale."""
        return self.scales[scale].seeds

    @abstractmethod
    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        """List the trials that are known from the results so far: a pure function. Sweeps run on the first
        seed."""

    def prepare(self, workplace: Workplace) -> None:  # noqa: B027  # most need nothing
        """Prepare what all trials need, once, before the first of them runs."""

    @abstractmethod
    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        """Run one trial. The result is JSON and a pure function of the trial's settings and the corpus,
        except for the key "timing", which holds measured times."""

    def export(self, trials: Sequence[Trial], workplace: Workplace) -> None:  # noqa: B027  # most leave results alone
        """Copy what is worth taking from the machine, beside results and figures, into the study's folder.

        Args:
            trials: all trials that are known by now, finished or not; none of them is running.
            workplace: their workplace.
        """

    @abstractmethod
    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        """Judge the claims by their rules and draw the figures into a folder."""

"""What a study is: trials to run, claims to judge, and what it found.

A study states its claims and the rule of each verdict before anything runs. Its trials are told from the
results
so far alone, so that a study that was stopped goes on where it was: rates for the main trials, say, follow
from those of the sweep. What it found is drawn and judged from results alone too.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch

from longshort.reporting.intervals import Interval
from longshort.reporting.page import Section

Scale = Literal["smoke", "laptop", "overnight", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
"""smoke: whether the machinery works, in seconds. laptop: what decides the verdicts, within 40 minutes on 2
cores. overnight: controls and interventions too, at least 5 seeds. paper: the author's sizes, for GPUs."""


@dataclass(frozen=True)
class Trial:
    """One thing to run.

    Attributes:
        arm: what is compared, such as "MHSA"; trials of one arm differ in seed or learning rate.
        seed: trials of unlike arms and the same seed are pairs.
        settings: all that decides the result, seed included; JSON.
        work: how long it takes, in a unit common to the study's trials, such as FLOPs.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    work: float = field(default=1.0, compare=False)

    @property
    def key(self) -> str:
        """Names the trial: a hash of its settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


Results = Mapping[str, Mapping[str, Any]]
"""Results of finished trials by `Trial.key`, JSON; numbers that were not finite are None."""


@dataclass(frozen=True)
class Plan:
    """The trials that are known by now.

    Attributes:
        trials: in the order in which they are run and written down.
        later_work: of the trials that will be known when these are done, for the time that is left.
    """

    trials: Sequence[Trial]
    later_work: float = 0.0


class Outcome(Enum):
    """What a study says of a claim."""

    SHOWN = "shown"
    PARTLY = "partly shown"
    NOT_SHOWN = "not shown at this scale"
    CONTRADICTED = "contradicted at this scale"
    ILLUSTRATED = "illustrated"
    NOT_MEASURED = "not measured at this scale"


@dataclass(frozen=True)
class Claim:
    """Something that the paper says, or that we ask.

    Attributes:
        id: of the paper's figure or table, such as "F2c"; or a word for questions of ours.
        statement: what is claimed.
        falsifier: what would speak against it.
        rule: when it counts as shown, and what else may come out; fixed before the trials are run.
    """

    id: str
    statement: str
    falsifier: str
    rule: str


@dataclass(frozen=True)
class Verdict:
    """The outcome for a claim, and the numbers that it rests on in one sentence."""

    claim: Claim
    outcome: Outcome
    evidence: str


@dataclass(frozen=True)
class Findings:
    """What a study says.

    Attributes:
        verdicts: a claim each.
        sections: for the report.
        predictions: by arm and quantity, where another seed's value will lie with 95 % confidence.
    """

    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    predictions: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)


def _tell_nobody(_share: float) -> None:
    pass


@dataclass(frozen=True)
class Workplace:
    """Where trials work.

    Attributes:
        folder: of all studies of one scale; corpora and training runs that they share lie here.
        source: the corpus, as for `longshort data`.
        tokenizer: of the corpus, "bytes" or "bpe" (10,000 pieces, as in the paper).
        threads: CPU threads of one trial.
        device: "cpu", "cuda" or "auto".
        report_progress: is told the share of the trial that is done, 0 ... 1.
    """

    folder: Path
    source: str
    tokenizer: str = "bytes"
    threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    report_progress: Callable[[float], None] = _tell_nobody

    @property
    def torch_device(self) -> torch.device:
        """The device, "auto" resolved: a GPU where there is one."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Study(ABC):
    """One figure or table of the paper, or a question of ours.

    Attributes:
        name: for the command line.
        title: for the report.
        claims: what is judged.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    claims: ClassVar[Sequence[Claim]]

    @abstractmethod
    def plan(self, scale: Scale, seeds: Sequence[int], results: Results) -> Plan:
        """The trials that follow from the results so far: a pure function. Sweeps run on the first seed."""

    @abstractmethod
    def default_seeds(self, scale: Scale) -> int:
        """How many seeds a scale has."""

    def prepare(self, workplace: Workplace) -> None:  # noqa: B027  # most need nothing
        """Make what all trials need, once, before the first of them runs."""

    @abstractmethod
    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        """Run one trial. The result is JSON and a pure function of the trial's settings and the corpus, but
        for the key "timing", which holds what depends on the machine's day."""

    @abstractmethod
    def findings(self, scale: Scale, seeds: Sequence[int], results: Results, folder: Path) -> Findings:
        """Judge the claims by their rules and draw the figures into a folder."""


def weaker(first: Outcome, second: Outcome) -> Outcome:
    """What holds if a claim must hold twice, such as at two learning rates."""
    if first == second:
        return first
    order = (Outcome.SHOWN, Outcome.PARTLY, Outcome.NOT_SHOWN)
    if first in order and second in order:
        return max(first, second, key=order.index)
    return Outcome.NOT_MEASURED if Outcome.NOT_MEASURED in (first, second) else Outcome.NOT_SHOWN

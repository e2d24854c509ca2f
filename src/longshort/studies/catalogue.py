"""The list of studies, and `longshort study`, which runs them in a folder and writes their report."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from longshort.checks import check_fields
from longshort.data import open_corpus
from longshort.reporting.files import replace_file, strict_json
from longshort.studies.allocation import Allocation
from longshort.studies.dense_local.study import DenseLocal
from longshort.studies.design import Design
from longshort.studies.explosion import Explosion
from longshort.studies.framework.claims import write_findings
from longshort.studies.framework.page import write_study_report
from longshort.studies.framework.runner import StudyProgress, run_trials
from longshort.studies.framework.store import RESULTS_FILE, ResultsFile
from longshort.studies.framework.study import Findings, Scale, Study, Verdict, Workplace
from longshort.studies.latency import Latency
from longshort.studies.length import Length
from longshort.studies.progress.study import Progress
from longshort.studies.remedies import Remedies
from longshort.training.config import Seed
from longshort.training.run import current_versions

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        DenseLocal(),
        Progress(),
        Allocation(),
        Explosion(),
        Length(),
        Remedies(),
        Design(),
        Latency(),
    )
}
ALL = "all"
_MANIFEST = "study.json"


@dataclass(frozen=True)
class _Defaults:
    """What a scale's trials run on, unless flags say otherwise.

    Attributes:
        jobs: trials at once; None: one per core.
        device: device of the trials.
        tokenizer: tokenizer of the corpus.
        exports: whether models are copied into the folder of the study, small enough to take along.
    """

    jobs: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    exports: bool = False


_DEFAULTS: Mapping[Scale, _Defaults] = {
    "gpu": _Defaults(jobs=4, device="auto", exports=True),
    "paper": _Defaults(jobs=1, device="auto", tokenizer="bpe"),
}
"""The defaults of the scales that are not for CPUs."""


@dataclass(frozen=True)
class StudySettings:
    """Run a study of the paper's claims, or resume one, and write its report.

    Each study states its claims and the rules of its verdicts before it runs. Finished trials are not run
    again: the same command resumes after Ctrl-C, and writes the report again if all trials are done.
    """

    name: str
    """dense-local, progress, allocation, explosion, length, remedies, design, latency, or all."""

    scale: Scale = "laptop"
    """smoke: seconds, only shows that the study runs. laptop: the trials that decide the verdicts, up to
    about an hour and a half a study on two cores; not for explosion, length and remedies, which judge no
    claim. overnight: hours, with controls. gpu: the author's small model on one GPU, for the study progress
    alone. paper: the author's sizes, for GPUs."""

    seeds: Annotated[int, Ge(1)] | None = None
    """Number of seeds of each arm. None: that of the scale."""

    first_seed: Seed = 0
    """The first seed; the others follow it. Another first seed than that of a folder needs another --out."""

    out: Path | None = None
    """Folder for results and report. None: runs/study-SCALE."""

    source: str = "stdlib"
    """Text to train on, as for `longshort data`."""

    jobs: Annotated[int, Ge(1)] | None = None
    """Trials to run at once, each on one CPU thread. None: one per core; at the scale gpu 4, which share the
    GPU, and 1 at the scale paper."""

    device: Literal["auto", "cpu", "cuda"] | None = None
    """Device of the trials. None: cpu; auto at the scales gpu and paper."""

    minutes: Annotated[float, Gt(0)] | None = None
    """Minutes after which running trials stop, each with a checkpoint, and the command ends with exit code 4;
    the same command resumes. A step, the checkpoints and the report add seconds to them. None: until all
    trials are done."""

    def __post_init__(self) -> None:
        if self.name != ALL and self.name not in STUDIES:
            raise ValueError(f"NAME must be one of {', '.join(STUDIES)} or {ALL}, got {self.name!r}")
        check_fields(self)
        if self.name != ALL and self.scale not in STUDIES[self.name].scales:
            having = [name for name, study in STUDIES.items() if self.scale in study.scales]
            raise ValueError(
                f"--scale must be one of {', '.join(STUDIES[self.name].scales)} for {self.name}, got "
                f"{self.scale!r}, a scale of {', '.join(having)}"
            )

    @property
    def folder(self) -> Path:
        """The folder of results and report."""
        return Path("runs") / f"study-{self.scale}" if self.out is None else self.out

    def seeds_of(self, study: Study) -> list[int]:
        """List the seeds of a study."""
        count = self.seeds or study.default_seeds(self.scale)
        return list(range(self.first_seed, self.first_seed + count))

    @property
    def studies(self) -> list[Study]:
        """List the studies that are asked for: of all, those that have the scale."""
        return [
            study
            for name, study in STUDIES.items()
            if self.name in (ALL, name) and self.scale in study.scales
        ]


@dataclass(frozen=True)
class StudiesRun:
    """The outcome of a call.

    Attributes:
        file: the page.
        verdicts: the verdicts of each study that was asked for.
        is_done: whether all trials are done; False only if the minutes were over before.
    """

    file: Path
    verdicts: Mapping[str, Sequence[Verdict]]
    is_done: bool


def run_studies(settings: StudySettings, progress: StudyProgress | None = None) -> StudiesRun:
    """Run the trials that are not done yet, judge the claims, and write figures and report.

    Raises:
        ValueError: the folder holds results of another scale, corpus or seeds of a study, or a file there is
            damaged.
        FileExistsError: the folder holds something else.
        FileNotFoundError: there is no such corpus.
        BlockingIOError: another process runs studies there.
        ChildProcessError: a trial failed; finished trials are kept.
        OSError: a file could not be written.
    """
    ends_at = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    open_corpus(settings.source)  # a wrong source is an error before anything is made
    folder = settings.folder
    defaults = _DEFAULTS.get(settings.scale, _Defaults())
    device = settings.device or defaults.device
    manifest = {"scale": settings.scale, "source": settings.source, "device": device}
    seeds = {study.name: settings.seeds_of(study) for study in settings.studies}
    _check_folder(folder, manifest, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _write_manifest(folder, manifest, seeds)
        work = {study.name: (study, ResultsFile(folder / study.name)) for study in settings.studies}
        workplace = Workplace(
            folder=folder.absolute(),
            source=settings.source,
            tokenizer=defaults.tokenizer,
            device=device,
        )
        jobs = settings.jobs or defaults.jobs or len(os.sched_getaffinity(0))
        is_done = run_trials(work, settings.scale, seeds, workplace, jobs, progress, ends_at)
        if defaults.exports:
            for name, (study, file) in work.items():
                study.export(study.plan(settings.scale, seeds[name], file.results).trials, workplace)
        found = judge_all(settings.scale, folder)
        page = write_study_report(
            folder,
            _read_manifest(folder),
            {STUDIES[name].title: findings for name, findings in found.items()},
        )
        return StudiesRun(page, {name: found[name].verdicts for name in work if name in found}, is_done)


def judge_all(scale: Scale, folder: Path) -> dict[str, Findings]:
    """Draw the figures and write the findings of all studies that have results in the folder.

    Args:
        scale: scale of the results.
        folder: folder with study.json and a folder per study.
    """
    seeds = _read_manifest(folder)["seeds"]
    found = {}
    for name, study in STUDIES.items():
        if scale not in study.scales or not (folder / name / RESULTS_FILE).is_file():
            continue  # earlier versions had more studies at some scales
        found[name] = study.findings(scale, seeds[name], ResultsFile(folder / name).results, folder / name)
        write_findings(folder / name, found[name])
    return found


def _check_folder(folder: Path, manifest: Mapping[str, str], seeds: Mapping[str, list[int]]) -> None:
    path = folder / _MANIFEST
    if path.is_file():
        content = _read_manifest(folder)
        found = {name: content.get(name) for name in manifest}
        if found != manifest:
            raise ValueError(
                f"--out: {folder} holds results of {found}, not of {dict(manifest)}; take another folder"
            )
        for name, held in content.get("seeds", {}).items():
            asked = seeds.get(name, held)
            if asked[0] != held[0]:  # its verdicts would replace those of others
                raise ValueError(
                    f"--first-seed: {folder} holds {name} from the seed {held[0]} on, got {asked[0]}; "
                    "take another --out for other seeds"
                )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"--out: {folder} exists and holds no study; it stays as it is")


def _write_manifest(folder: Path, manifest: Mapping[str, str], seeds: Mapping[str, list[int]]) -> None:
    """Add the seeds, machine and versions of this call to those of earlier calls."""
    path = folder / _MANIFEST
    before: dict[str, Any] = _read_manifest(folder) if path.is_file() else {}
    versions = ", ".join(f"{name} {version}" for name, version in current_versions().items())
    here = f"{versions}, CPU with {torch.backends.cpu.get_cpu_capability()}"
    content = {
        **manifest,
        "seeds": {**before.get("seeds", {}), **seeds},
        "made_with": list(dict.fromkeys([*before.get("made_with", []), here])),
    }
    replace_file(path, strict_json(content).encode())


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _MANIFEST).read_text())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process works on the studies in {folder}") from None
        yield

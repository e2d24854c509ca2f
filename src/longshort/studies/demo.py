"""The demo: LS-attention and full attention (MHSA) of equal size, trained side by side on real text.

Both start from the same initial weights and see the same batches; the one difference is how far their heads
see. Each trains in a separate process with one thread, by the command `longshort train`, so that their speeds
can be compared on a machine with two cores.

`SETTING` describes the setting and how it was chosen.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from longshort.checks import check_fields
from longshort.data import DataFolder, open_corpus, prepare
from longshort.evaluation import Evaluation, evaluate_documents, generate_text
from longshort.reporting.files import replace_file, strict_json
from longshort.studies.framework.processes import ended_by_signals
from longshort.studies.language.trial import largest, last_tenth, with_band
from longshort.training.config import Seed
from longshort.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from longshort.training.trained import open_trained

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODELS = {"LS-attention": "ls", "MHSA": "mhsa"}
"""The folder of each model's run, by name of the model."""

PROMPT = 'def read_lines(path):\n    """'
SETTING = (
    "The models are the preset tiny: 2 layers, width 64, 4 heads of 16; in LS-attention one of them is "
    "global and three have a window of 16. They read bytes. By default they train for 2,000 steps on 6 "
    "sequences of 640 bytes, at a learning rate of 3e-3 that falls along a cosine to a tenth. This "
    "setting was chosen by trying sequences of 512 to 1024 bytes, with seed 0, for one that fits into "
    "the time and shows both the loss and the logits. MHSA learns slowly at first, then finds "
    "short-range attention, with logits that grow and grow: the longer the sequence, the later. At 512 "
    "(2,500 steps) it had caught up with LS-attention in loss, 1.81 against 1.83, with logits of 97 against "
    "18. At 640 it is on its way. At 768 its loss was 2.27, its logits had reached 37. At 1024 it had "
    "hardly begun: loss 2.31, logits 13, where LS-attention came to 1.90 (at 5e-3). Seed 1 at 640 shows the "
    "same as seed 0."
)
"""The setting of the demo and how it was chosen, for the report."""

_NUMBERS_FILE = "demo.json"
_OWN_ENTRIES = {"data", "plots", "report.html", _NUMBERS_FILE, *MODELS.values()}
_OWN_ENTRIES |= {f"{folder}.log" for folder in MODELS.values()}
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class DemoSettings:
    """Train LS-attention and full attention (MHSA) of equal size side by side: same text, same initial
    weights, same batches, one core each. Takes about seven minutes on two cores, and ends with a report.
    """

    out: Path
    """Folder for all files of the demo."""

    overwrite: bool = False
    """Replace an earlier demo in OUT."""

    source: str = "stdlib"
    """Text to train on, as for `longshort data`."""

    steps: Annotated[int, Ge(1)] = 2000
    """Training steps of each model."""

    sequence_length: Annotated[int, Ge(1)] = 640
    """Tokens per training sequence."""

    tokens_per_step: Annotated[int, Ge(1)] = 3840
    """Tokens of each training step."""

    learning_rate: Annotated[float, Gt(0)] = 3e-3
    """Learning rate after the warm-up; it falls along a cosine to a tenth."""

    evaluation_tokens: Annotated[int, Ge(1)] = 500_000
    """Most validation tokens, in whole documents, on which the trained models are measured."""

    seed: Seed = 0
    """Seed of the initial weights and the batches."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"--tokens-per-step must be a multiple of --sequence-length ({self.sequence_length}), "
                f"got {self.tokens_per_step}"
            )


class DemoProgress:
    """Callbacks of the demo; override those that you need."""

    def on_stage(self, text: str) -> None:
        """Called when a part of the demo begins."""

    def on_training(self, name: str, step: int, record: dict[str, Any]) -> None:
        """Called when a model has done `step` steps; `record` holds the newest value of each measurement."""


@dataclass(frozen=True)
class ModelResult:
    """The results of one model.

    Attributes:
        parameters: number of parameters.
        evaluation: evaluation on whole validation documents, with the context of the training.
        max_logit: largest |scale·q·k| over the last tenth of the training; None if it was not finite.
        max_logit_in_band: the same over the pairs inside the local window, so that both models have equal
            pairs.
        logit_growth: factor by which the largest logit grew from two thirds of the training to its end.
        first_not_finite: first logged step whose loss was not finite; None if all were.
        tokens_per_second: median in training, while both models train at once.
        training_seconds: time of the training steps alone.
        sample: the model's continuation of `PROMPT`.
    """

    parameters: int
    evaluation: Evaluation
    max_logit: float | None
    max_logit_in_band: float | None
    logit_growth: float | None
    first_not_finite: int | None
    tokens_per_second: float
    training_seconds: float
    sample: str


def run_demo(settings: DemoSettings, progress: DemoProgress | None = None) -> dict[str, ModelResult]:
    """Prepare the data, train both models, measure them, and write demo.json into `settings.out`.

    Ctrl-C and SIGTERM stop both trainings.

    Raises:
        FileExistsError: `settings.out` is not empty and `overwrite` is not set, or holds other files.
        BlockingIOError: the trainings of an earlier demo are still running there.
        FileNotFoundError, ValueError: the source is not usable.
        ChildProcessError: a training failed; its log is in `settings.out`.
        OSError: a file could not be written.
    """
    progress = progress or DemoProgress()
    out = settings.out
    open_corpus(settings.source)  # a wrong source is an error before an earlier demo is removed
    _clear(out, settings.overwrite)
    with ended_by_signals():
        progress.on_stage(f"preparing data from {settings.source}")
        prepare(settings.source, out / "data")
        progress.on_stage(
            f"training both models, {settings.steps:,} steps of {settings.tokens_per_step:,} tokens"
        )
        _train_side_by_side(settings, progress)
    results = {}
    for name, folder in MODELS.items():
        progress.on_stage(f"evaluating {name}")
        results[name] = _measure(settings, out / folder)
    content = {
        "settings": {name: str(value) for name, value in asdict(settings).items()},
        "models": {name: asdict(result) for name, result in results.items()},
    }
    replace_file(out / _NUMBERS_FILE, strict_json(content).encode())
    return results


def training_arguments(settings: DemoSettings, folder: str) -> list[str]:
    """Return the arguments of `longshort` that train one of the models."""
    values = {
        "data": settings.out / "data",
        "out": settings.out / folder,
        "steps": settings.steps,
        "sequence-length": settings.sequence_length,
        "batch-size": settings.tokens_per_step // settings.sequence_length,
        "learning-rate": settings.learning_rate,
        "seed": settings.seed,
        "threads": 1,
        "device": "cpu",
        "log-every": 10,
        "monitor-every": 10,
        "evaluate-every": max(1, settings.steps // 10),
        "validation-windows": 16 * settings.tokens_per_step // settings.sequence_length,
        "checkpoint-every": settings.steps,
    }
    arguments = ["train", "tiny"]
    for name, value in values.items():
        arguments += [f"--{name}", str(value)]
    return [*arguments, "--mhsa"] if folder == MODELS["MHSA"] else arguments


def _clear(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"--out: {out} exists and is not empty; --overwrite replaces an earlier demo")
    if not out.is_dir():
        raise FileExistsError(f"--out: {out} is not a folder; it stays as it is")
    strangers = sorted(entry.name for entry in out.iterdir() if not _is_own(entry.name))
    if strangers:
        raise FileExistsError(f"--out: {out} holds more than a demo ({strangers[0]!r}); it stays as it is")
    for folder in MODELS.values():
        if (out / folder / METRICS_FILE).exists():
            MetricsLog(out / folder).close()  # raises an error if a process is training there
    for entry in out.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_own(name: str) -> bool:
    """Return whether a demo writes an entry of this name, including partial files of a killed one."""
    return name in _OWN_ENTRIES or any(name.startswith(f".{own}.") for own in _OWN_ENTRIES)


def _train_side_by_side(settings: DemoSettings, progress: DemoProgress) -> None:
    commands = {
        name: [sys.executable, "-m", "longshort", *training_arguments(settings, folder)]
        for name, folder in MODELS.items()
    }
    logs = {name: settings.out / f"{folder}.log" for name, folder in MODELS.items()}
    with _processes(commands, logs) as processes:
        running = dict(processes)
        while running:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for name in list(running):
                code = running[name].poll()
                _show(progress, name, settings.out / MODELS[name])
                if code is not None:
                    del running[name]
                if code:
                    lines = logs[name].read_text().strip().splitlines() or ["no message"]
                    raise ChildProcessError(f"training {name} failed, see {logs[name]}: {lines[-1]}")


@contextmanager
def _processes(
    commands: dict[str, list[str]], logs: dict[str, Path]
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run commands at once; however the block ends, none of them outlives it."""
    # One thread each from the start: a larger thread pool costs time even if it is not used.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with open(logs[name], "wb") as log:
                log.write(f"{shlex.join(command)}\n".encode())
                log.flush()
                # In a separate session: only this process gets Ctrl-C, and it stops both cleanly.
                processes[name] = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        yield processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
        for process in processes.values():
            process.wait()


def _show(progress: DemoProgress, name: str, run: Path) -> None:
    if not (run / METRICS_FILE).is_file():
        return
    newest: dict[str, Any] = {}
    for line in read_metrics(run):
        newest |= line
    if newest:
        progress.on_training(name, newest["step"], newest)


def _measure(settings: DemoSettings, run: Path) -> ModelResult:
    trained = open_trained(run)
    data = DataFolder.open(settings.out / "data")
    evaluation = evaluate_documents(
        trained.model,
        data.validation,
        context_length=settings.sequence_length,
        max_tokens=settings.evaluation_tokens,
    )
    free = settings.sequence_length - len(PROMPT.encode()) - 1
    sample = "" if free < 1 else "".join(
        generate_text(
            trained.model, trained.tokenizer, PROMPT,
            max_new_tokens=min(300, free), temperature=0.7, seed=settings.seed,
        )
    )  # fmt: skip
    metrics = read_metrics(run)
    return ModelResult(
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        evaluation=evaluation,
        sample=sample,
        **summarize_training(metrics),
    )


def summarize_training(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the parts of a `ModelResult` that depend only on its metrics."""
    monitored = [with_band(line) for line in metrics if "max_logit" in line]
    late = last_tenth(monitored)
    middle = monitored[int(len(monitored) * 0.6) : max(1, int(len(monitored) * 0.7))] or monitored[:1]
    seconds, tokens_before = 0.0, 0
    for line in metrics:
        seconds += (line["tokens"] - tokens_before) / line["tokens_per_second"]
        tokens_before = line["tokens"]
    end, before = (largest(line["max_logit"] for line in lines) for lines in (late, middle))
    return {
        "max_logit": end,
        "max_logit_in_band": largest(line["max_logit_in_band"] for line in late),
        "logit_growth": end / before if end and before else None,
        "first_not_finite": next((line["step"] for line in metrics if line["loss"] is None), None),
        "tokens_per_second": median(line["tokens_per_second"] for line in metrics),
        "training_seconds": seconds,
    }

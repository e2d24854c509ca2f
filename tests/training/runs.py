"""What tests of runs share."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.processes import SECONDS, run_processes

from longshort.training.config import TrainConfig
from longshort.training.loop import Progress, resume, train
from longshort.training.metrics import read_metrics
from longshort.training.progress import RunOutcome
from longshort.training.run import RunConfig

SettingsFor = Callable[..., TrainConfig]

_PROGRAM = """
import json, sys
from longshort.training.config import TrainConfig
from longshort.training.loop import Progress, resume, train

class Lines(Progress):
    def on_step(self, step, record):
        print("step", step, flush=True)
    def on_message(self, text):
        print(text, flush=True)

settings = TrainConfig(**json.loads(sys.argv[1]))
outcome = resume(settings.out, progress=Lines()) if settings.out.exists() else train(settings, Lines())
sys.exit(outcome.exit_code)
"""


class Recorder(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.steps: list[tuple[int, dict[str, Any] | None]] = []
        self.messages: list[str] = []

    def on_start(self, run: RunConfig, step: int) -> None:
        self.starts.append(step)

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        self.steps.append((step, record))

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def losses(run: Path) -> list[float]:
    """The training loss of each line."""
    return [record["loss"] for record in read_metrics(run)]


def without_speed(run: Path) -> list[dict[str, Any]]:
    """All lines, but for the one number that differs from run to run."""
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(run)
    ]


def assert_close_metrics(run: Path, other: Path, rel: float) -> None:
    """The lines of two runs have the same keys and, within a relative error, the same numbers."""
    for mine, theirs in zip(without_speed(run), without_speed(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if value is None:
                assert theirs[name] is None
                continue
            torch.testing.assert_close(
                torch.tensor(value, dtype=torch.float64), torch.tensor(theirs[name], dtype=torch.float64),
                rtol=rel, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


def torchrun(processes: int) -> tuple[str, ...]:
    """Return the words that, put before a command, run it in `processes` processes."""
    program = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return (*program, "--nproc-per-node", str(processes), "--no-python")


def start(settings: TrainConfig, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Train, or go on, in a process of its own (or more, with a launcher); it prints a line per step."""
    return start_program(_PROGRAM, json.dumps(vars(settings), default=str), launcher=launcher)


def start_program(program: str, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*launcher, sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_together(settings: TrainConfig, processes: int, seconds: int = SECONDS) -> None:
    """Train, or go on, in forked processes of one group, each of which must end with exit code 0."""
    outcomes = run_processes(_train, processes, settings, seconds=seconds)
    assert [outcome.exit_code for outcome in outcomes] == [0] * processes


def _train(settings: TrainConfig) -> RunOutcome:
    return resume(settings.out) if settings.out.exists() else train(settings)


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Read what the process prints until it has done this step."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        if line == f"step {step}\n":
            return
        printed.append(line)
    raise AssertionError(f"the process ended before step {step}: {''.join(printed)}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The process's exit code, and what it printed since it was last read."""
    assert process.stdout is not None
    with process.stdout as stdout:
        output = stdout.read()
    return process.wait(), output

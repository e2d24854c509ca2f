"""The reports of a run while it trains, and the outcome of a call of `train` or `resume`."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshort.training.parallel import Ranks
from longshort.training.run import RunConfig


class Progress:
    """Callbacks of a run on its main process; override those that you need."""

    def on_start(self, run: RunConfig, step: int) -> None:
        """Called when training starts, or resumes, after `step` steps."""

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        """Called when a step is done; `record` is its line of metrics.jsonl, if it has one."""

    def on_message(self, text: str) -> None:
        """Called with a message for the user."""


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a call of `train` or `resume`.

    Attributes:
        run: the run's folder.
        step: optimizer steps done; there is a checkpoint of this step.
        steps: optimizer steps that the run is to have.
        signal: number of the signal that stopped it early; None if none did.
        stopped_by_spike: whether a spike ended it.
    """

    run: Path
    step: int
    steps: int
    signal: int | None
    stopped_by_spike: bool = False

    @property
    def exit_code(self) -> int:
        """The exit code for the shell: 0; 128 + the signal's number (130 after Ctrl-C); 3 after a spike."""
        if self.stopped_by_spike:
            return 3
        return 0 if self.signal is None else 128 + self.signal


def resume_command(run: Path, ranks: Ranks) -> str:
    """Return the command that resumes a run."""
    program = "longshort"
    if ranks.world_size > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)
        program = f"torchrun --nproc-per-node {local} -m longshort"
    return f"{program} train --resume {shlex.quote(str(run))}"

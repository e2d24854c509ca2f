"""The measurements of a run, line by line: metrics.jsonl, and TensorBoard beside it.

A line is one strict JSON object. Its keys:

- `step`: optimizer steps done, this one included; `tokens`: training tokens seen up to then.
- `loss` (nats per token) of this step's batch and `grad_norm` before clipping, both at the weights before the
  step; `learning_rate` of the step; `tokens_per_second` since the line before, checkpoints and validation
  not counted.
- where the peak of the device is known, `mfu`: the share of it that this speed is; see
  `longshort.training.utilization`.
- if the run is monitored, `max_logit` and its parts `max_logit_local`, `max_logit_global` and
  `max_logit_global_in_band`, as last measured; null if the model has no such heads.
- on the steps that measure them, `max_logit_by_head` and `entropy_by_head` (nats), a list for each layer.
  With `monitor_row_range` also `row_range` and its parts `row_range_local`, `row_range_global` and
  `row_range_global_in_band`: the largest difference between two logits of one query, null as above, and
  `row_range_by_head`. With `alarms` these and `update_entropy_by_head` (nats), the spectral entropy of the
  update of query and key weights since the measurement before; the first one is of the update since the run
  began, and one after a break is as without it. Where nothing changed it is null.
- `validation_loss` (nats per token) after the step, on evaluated steps; with `probe` also `copying_loss`, on
  the second half of random tokens that repeat, and `probe`, the attributes of a `ProbeReading` on the
  validation windows by name.
- `qk_clipped`: with QK-clip, the heads that were scaled after the step.
- `spike`, on a step that showed one: `reasons`, `onset` (the step at which it began) and `action`; with the
  action "rollback" also `to_step`, the steps that stay done, and `batches_skipped`, batches left out so far.
- `attempt`: number of rollbacks before this line; absent if there were none.

After a rollback the lines of the abandoned steps stay; the steps of the next attempt follow them.

JSON has no NaN and no infinity: a measured value that is not finite is null.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshort.extras import require
from longshort.reporting.files import finite_or_none, parse_json_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Appends to a run's metrics; the process that holds it is the only one that trains the run.

    Args:
        run: the run's folder.

    Raises:
        BlockingIOError: another process is training this run.
    """

    def __init__(self, run: Path):
        self._run = run
        self._file = open(run / METRICS_FILE, "a+b")  # noqa: SIM115  # closed by close()
        self._board: SummaryWriter | None = None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(f"{run} is being trained by another process") from None

    def begin(self, step: int, tensorboard: bool = False, attempt: int = 0) -> dict[str, Any] | None:
        """Cut off what comes after `step` of `attempt`, the half line of a killed process included.

        Args:
            step: optimizer steps after which the run continues.
            tensorboard: write TensorBoard's files too.
            attempt: number of rollbacks so far; lines of earlier attempts stay.

        Returns:
            The last line that counts, if there is one.

        Raises:
            ValueError: a line is not a JSON object with a step.
        """
        kept, lines = 0, []
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            record = parse_json_line(line, self._run / METRICS_FILE, number, "step")
            if (record.get("attempt", 0), record["step"]) > (attempt, step):
                break
            kept += len(line)
            lines.append(record)
        self._file.truncate(kept)
        if self._board is not None:
            self._board.close()
        if tensorboard:
            require("the setting tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run / TENSORBOARD_FOLDER), purge_step=step + 1)
        counted = _without_abandoned(lines)
        return counted[-1] if counted else None

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; it has reached the operating system when this returns.

        Raises:
            OSError: the disk is full, or the line cannot be written for another reason.
        """
        line = json.dumps(finite_or_none(record), allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._run / METRICS_FILE} could not be written: {error}") from error
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files and let other processes train this run."""
        with suppress(OSError):  # a line that could not be written was reported by write()
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run: Path | str, *, abandoned: bool = False) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl; values that were not finite are None.

    An incomplete last line, which a killed process may leave, is not read.

    Args:
        run: the run's folder.
        abandoned: also return the lines of steps that a rollback undid, in the order in which they were
            written. Without them the steps ascend.

    Raises:
        FileNotFoundError: the folder has no metrics.jsonl.
        ValueError: a line is not a JSON object with a step.
    """
    path = Path(run) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {METRICS_FILE} in {run}")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        records.append(parse_json_line(line, path, number, "step"))
    return records if abandoned else _without_abandoned(records)


def has_values(metrics: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Return whether at least one line holds a value of `key` that is not null."""
    return any(line.get(key) is not None for line in metrics)


def _without_abandoned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counted: list[dict[str, Any]] = []
    for record in records:
        counted.append(record)
        spike = record.get("spike", {})
        if spike.get("action") == "rollback":
            counted = [earlier for earlier in counted if earlier["step"] <= spike["to_step"]]
    return counted


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    scalars = []
    for name, value in record.items():
        if isinstance(value, list):
            scalars += [
                (f"{name}/layer_{layer}/head_{head}", entry)
                for layer, heads in enumerate(value)
                for head, entry in enumerate(heads)
            ]
        elif isinstance(value, int | float) and name != "step":
            scalars.append((name, value))
    return scalars

"""Callbacks for the Trainer of transformers: attention logits in its logs, QK-clip, z-loss."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from longshort.checks import require_integer, require_positive
from longshort.huggingface.qk_clip import QKClip
from longshort.huggingface.update_entropy import update_entropy_of
from longshort.huggingface.watch import LogitMonitor
from longshort.stability import MAX_LOGITS, ROW_RANGES, Reading, UpdateEntropy, z_loss

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["LogitCallback", "QKClipCallback", "ZLossCallback", "attach"]

_IGNORED = -100
_WEIGHTS = "alarms.safetensors"
_LOGGED = ("loss", "learning_rate", "grad_norm", "epoch")


def attach(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Add callbacks to a Trainer before all others, in their order.

    What they add to the logs then reaches TensorBoard and the other loggers, which would run first with
    `Trainer(callbacks=...)` and `add_callback`.

        attach(trainer, LogitCallback(every=10), QKClipCallback(threshold=100))
        trainer.train()

    Raises:
        TypeError: a callback is no TrainerCallback, or trainer no Trainer.
    """
    handler = getattr(trainer, "callback_handler", None)
    if handler is None:
        raise TypeError(f"trainer must be a Trainer of transformers, got {type(trainer).__name__}")
    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            raise TypeError(f"callbacks must be instances of TrainerCallback, got {callback!r}")
    handler.callbacks[:0] = callbacks


class _MonitorCallback(TrainerCallback):
    """A callback that reads the attention logits of some steps, from all their passes, in all processes."""

    def __init__(self) -> None:
        self._watching = ExitStack()
        self._monitor: LogitMonitor | None = None
        self._is_watching = False

    def _is_due(self, step: int, last: int) -> bool:
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()  # if an error has ended another training
        self._monitor = LogitMonitor(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._monitor is not None
        if self._is_due(state.global_step + 1, state.max_steps):
            self._watching.enter_context(self._monitor)
            self._is_watching = True

    def _read(self) -> Reading | None:
        """Return the reading of the step whose passes are done, None if it is not measured."""
        if not self._is_watching:
            return None
        self._stop()
        assert self._monitor is not None
        return self._monitor.reading()

    def _stop(self) -> None:
        self._is_watching = False
        self._watching.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        self._monitor = None


class LogitCallback(_MonitorCallback):
    """A callback that adds the model's attention logits to a Trainer's logs, and by head to a file.

    The logs of the training get `max_logit`, `row_range` and their parts for local and global heads, as last
    measured. The file gets a line of JSON for each measured step, as `longshort train` writes it to
    metrics.jsonl: `step`, these numbers, `max_logit_by_head`, `entropy_by_head` and `row_range_by_head` (a
    list for each layer), and if the step was logged, its `loss`, `learning_rate` and `grad_norm`.

    Add it with `attach`, so that loggers see its numbers. An error that ends the training in the middle of a
    measured step leaves the model watched until the callback is dropped or used again.

    Args:
        every: measure step 1, each step that is divisible by it, and the last.
        file: the JSONL file, written by the main process; None: none. A training that begins refuses a file
            that exists; one that resumes from a checkpoint continues it, without the lines of later steps.
        update_entropy: also measure `update_entropy_by_head`, the spectral entropy of what has changed in
            each head's product of query and key weights since the last measurement. It keeps a copy of these
            weights, in checkpoints too, as alarms.safetensors. Training that resumes from a checkpoint of
            `output_dir` compares with the weights kept there; from another checkpoint, with its own.

    Attributes:
        reading: the last one.
        reading_step: its step; 0 if there is none.

    Raises:
        ValueError: every is not an integer >= 1, or update_entropy is not a bool. When the training begins,
            also what `update_entropy_of` refuses.
    """

    def __init__(
        self,
        every: int = 10,
        file: str | os.PathLike[str] | None = None,
        *,
        update_entropy: bool = False,
    ) -> None:
        super().__init__()
        require_integer("every", every, minimum=1)
        if not isinstance(update_entropy, bool):
            raise ValueError(f"update_entropy must be True or False, got {update_entropy!r}")
        self._every = every
        self._measures_updates = update_entropy
        self._update_entropy: UpdateEntropy | None = None
        self._file = None if file is None else Path(file)
        self._pending: dict[str, Any] | None = None
        self._attempt = 0
        self.reading: Reading | None = None
        self.reading_step = 0

    def _is_due(self, step: int, last: int) -> bool:
        return step in (1, last) or step % self._every == 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._file is not None and state.is_world_process_zero:
            self._attempt = _continue_file(self._file, state.global_step)
        self._pending, self.reading, self.reading_step = None, None, 0
        if self._measures_updates:
            self._update_entropy = update_entropy_of(kwargs["model"])
            weights = _checkpoint(args, state) / _WEIGHTS
            if state.global_step and weights.exists():
                self._update_entropy.restore(load_file(weights))
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state)
        super().on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reading = self._read()
        if reading is not None:
            if self._update_entropy is not None:
                reading = replace(reading, update_entropy_by_head=self._update_entropy.measure())
            self.reading, self.reading_step = reading, state.global_step + 1
            self._pending = {"step": self.reading_step} | reading.as_metrics()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = _checkpoint(args, state)
        if self._update_entropy is None or not args.should_save or not folder.is_dir():
            return
        weights = {name: x.cpu() for name, x in self._update_entropy.state().items()}
        partial = folder / f".{_WEIGHTS}.partial"
        save_file(weights, partial)
        os.replace(partial, folder / _WEIGHTS)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs or self.reading is None:  # of an evaluation, or the summary at the end
            return
        names = (*MAX_LOGITS, *ROW_RANGES)
        numbers = {name: getattr(self.reading, name) for name in names}
        numbers = {name: value for name, value in numbers.items() if value is not None}
        logs |= numbers
        state.log_history[-1] |= numbers
        if self._pending is not None and self._pending["step"] == state.global_step:
            self._pending |= {name: logs[name] for name in _LOGGED if name in logs}

    @property
    def measures_updates(self) -> bool:
        """Whether it measures `update_entropy_by_head`."""
        return self._measures_updates

    def record(self, entry: dict[str, Any], step: int) -> None:
        """Add entries to the line of a step; make the line if there is none."""
        if self._pending is None or self._pending["step"] != step:
            self._pending = {"step": step}
        self._pending |= entry

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state)
        super().on_train_end(args, state, control, **kwargs)

    def _write(self, state: TrainerState) -> None:
        record, self._pending = self._pending, None
        if record is None or self._file is None or not state.is_world_process_zero:
            return
        if self._attempt:
            record["attempt"] = self._attempt
        line = json.dumps(_finite_or_none(record), allow_nan=False)
        with open(self._file, "a") as file:
            file.write(line + "\n")


class QKClipCallback(_MonitorCallback, ExportableState):
    """A callback that applies `QKClip` after each optimizer step of a Trainer, by the logits of that step.

    Each step is measured; beside a `LogitCallback` both use the same numbers.

    The Trainer's checkpoints of a model with adapters hold the adapter alone. What it lacks where frozen
    weights were scaled (see `QKClip`) is in their trainer_state.json, so that a training that resumes, or
    goes back by a `SpikeCallback` or to its best checkpoint, has the same model as before. Save the merged
    model in the end.

    Args:
        threshold: > 0; Kimi K2 has 100.

    Attributes:
        clipped: number of query heads that were scaled after the last step; in the logs as `qk_clipped`.

    Raises:
        ValueError: threshold is not finite and > 0. When the training begins, also what `QKClip` refuses.
    """

    def __init__(self, threshold: float = 100.0) -> None:
        super().__init__()
        require_positive("threshold", threshold)
        self._threshold = threshold
        self._clip: QKClip | None = None
        self._reading: Reading | None = None
        self.clipped = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the Trainer keeps."""
        factors = None if self._clip is None else self._clip.frozen_factors
        return {"args": {"threshold": self._threshold}, "attributes": {"frozen_factors": factors}}

    def _is_due(self, step: int, last: int) -> bool:
        return True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._clip = QKClip(kwargs["model"], self._threshold)
        states: Any = state.stateful_callbacks
        if state.global_step:
            self._restore(states)
        states.setdefault(type(self).__name__, self.state())  # the Trainer needs it to save another

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:
            self._restore(json.loads((Path(best) / TRAINER_STATE_NAME).read_text())["stateful_callbacks"])

    def _restore(self, states: dict[str, Any]) -> None:
        """Scale the frozen weights of a model with adapters as in the checkpoint with these states."""
        assert self._clip is not None
        now = self._clip.frozen_factors
        saved: Any = states.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        factors = saved["attributes"]["frozen_factors"] if saved else [[1.0] * len(heads) for heads in now]
        if factors != now:
            self._clip.restore_frozen(factors)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reading = self._read()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._clip is not None and self._reading is not None
        self.clipped = self._clip.apply(self._reading.max_logit_by_head)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "loss" in kwargs["logs"]:
            kwargs["logs"]["qk_clipped"] = state.log_history[-1]["qk_clipped"] = self.clipped


class ZLossCallback(TrainerCallback):
    """A callback that adds a z-loss to the loss that a model computes from its labels in training.

    The loss that is logged in training contains it; that of evaluations does not.

    Args:
        weight: > 0, of `longshort.stability.z_loss`; PaLM has 1e-4.

    Raises:
        ValueError: weight is not finite and > 0. In the training, if the model is called without labels (as
            with label smoothing), or returns no loss or no logits.
    """

    def __init__(self, weight: float = 1e-4) -> None:
        require_positive("weight", weight)
        self._weight = weight
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()
        self._handle = kwargs["model"].register_forward_hook(self._add, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not module.training:
            return output
        shifted, labels = kwargs.get("shift_labels"), kwargs.get("labels")
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if loss is None or logits is None or (shifted is None and labels is None):
            raise ValueError(
                "the model must be called with labels and return its loss and logits for a z-loss, got "
                f"{sorted(kwargs)} and {type(output).__name__}; label_smoothing_factor must be 0"
            )
        if shifted is None:
            assert labels is not None
            logits, shifted = logits[:, :-1], labels[:, 1:]
        term = z_loss(logits, shifted.to(logits.device))
        count = kwargs.get("num_items_in_batch")  # the Trainer's loss is a sum over them
        if count is not None:
            term = term * (shifted != _IGNORED).sum().to(term.device) / count
        output.loss = loss + self._weight * term
        return output


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the Trainer's checkpoint of this step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _continue_file(path: Path, step: int) -> int:
    """Cut off the lines of steps that a resumed training repeats; lines that a rollback undid stay.

    Returns:
        The number of rollbacks so far.

    Raises:
        FileExistsError: the training is a new one, and the file exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0
    if step == 0:
        raise FileExistsError(f"{path} exists already; choose another name")
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    records = [json.loads(line) for line in lines]
    while records and records[-1]["step"] > step and not _is_rollback(records[-1]):
        records.pop()
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(lines[: len(records)]))
    os.replace(partial, path)
    return sum(map(_is_rollback, records))


def _is_rollback(record: dict[str, Any]) -> bool:
    return record.get("spike", {}).get("action") == "rollback"


def _finite_or_none(value: Any) -> Any:
    """Copy with None for each number that is not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {name: _finite_or_none(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

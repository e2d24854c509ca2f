"""`SpikeCallback`: detection of spikes in a training by the Trainer of transformers, and rollback.

A rollback is that of `longshort train`: back to a checkpoint from before the spike, and on with other
batches. The Trainer's loop cannot go back while it runs, so it ends and begins again from the checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from accelerate import skip_first_batches
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from longshort.checks import require_integer
from longshort.huggingface.callbacks import LogitCallback, attach
from longshort.stability import Spike, SpikeDetector
from longshort.stability.alarms import ALARM_MEASUREMENTS

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import TrainOutput

__all__ = ["OnSpike", "SpikeCallback"]

OnSpike = Literal["report", "stop", "rollback"]
"""What to do at a spike: report it, stop the training, or train on from the last checkpoint before it."""

_STATE_FILE = "trainer_state.json"

logger = logging.get_logger(__name__)


class SpikeCallback(TrainerCallback, ExportableState):
    """Watches the logs of a Trainer for spikes, with a `SpikeDetector`, and responds to them.

    The numbers are those that the Trainer logs: the loss since the last log, the gradient norm, and with a
    `LogitCallback` the largest logit, if the step was measured. So `logging_steps=1` watches every step; with
    more, a window of the detector counts logs. The Trainer hides losses that are not finite unless
    `logging_nan_inf_filter=False`; a gradient norm that is not finite is seen in any case.

    - "report" logs a warning.
    - "stop" also saves a checkpoint and ends the training.
    - "rollback" goes back to the latest checkpoint at least `rollback_steps` before the spike's first sign
      (if there is none, to the first before it) and trains on with later batches: those from the checkpoint
      to the spike are left out, and at least `skip_batches`. The checkpoints in between are kept under the
      name abandoned-N-checkpoint-S. Without such a checkpoint, or after `max_rollbacks`, it stops. It needs
      `train` of this class, since the Trainer's own cannot go back.

        logits = LogitCallback(every=10, file="metrics.jsonl")
        spikes = SpikeCallback("rollback", logits=logits)
        attach(trainer, logits, spikes)
        spikes.train(trainer)

    What the detector has seen is part of the Trainer's checkpoints, so a training that was interrupted
    decides like one that was not.

    Args:
        on_spike: the response.
        detector: its fields are used, not what it has seen; None: the default one.
        logits: measures the largest logit, and what the detector's alarm needs; attach it first. Spikes are
            then in its file, as `spike`.
        rollback_steps: as in `longshort train`.
        skip_batches: as in `longshort train`; a batch is what one optimizer step takes.
        max_rollbacks: as in `longshort train`.

    Attributes:
        spikes: the spikes so far, with `step`, `onset`, `reasons`, `action` and, for a rollback, `to_step`
            and `batches_skipped`.

    Raises:
        ValueError: an argument is out of its range; or the detector's alarm needs `logits`, for "update" with
            `update_entropy=True`.
    """

    def __init__(
        self,
        on_spike: OnSpike = "report",
        detector: SpikeDetector | None = None,
        *,
        logits: LogitCallback | None = None,
        rollback_steps: int = 100,
        skip_batches: int = 200,
        max_rollbacks: int = 5,
    ) -> None:
        if on_spike not in get_args(OnSpike):
            raise ValueError(f"on_spike must be one of {', '.join(get_args(OnSpike))}, got {on_spike!r}")
        require_integer("rollback_steps", rollback_steps, minimum=1)
        require_integer("skip_batches", skip_batches, minimum=0)
        require_integer("max_rollbacks", max_rollbacks, minimum=0)
        self._detector = detector or SpikeDetector()
        alarm = self._detector.alarm
        if alarm is not None and logits is None:
            raise ValueError(
                f"logits must be a LogitCallback for a detector with the alarm {alarm!r}, got None"
            )
        if alarm == "update" and logits is not None and not logits.measures_updates:
            raise ValueError(
                "logits must be a LogitCallback(update_entropy=True) for a detector with the alarm 'update', "
                "got one with False"
            )
        self._on_spike: OnSpike = on_spike
        self._logits = logits
        self._rollback_steps, self._skip_batches = rollback_steps, skip_batches
        self._max_rollbacks = max_rollbacks
        self._fresh = self._detector.state()
        self._is_driven = False
        self.spikes: list[dict[str, Any]] = []
        self._left_out: list[list[int]] = []  # [step, batches left out after it]
        self._to_step: int | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the Trainer keeps."""
        return {"args": {}, "attributes": {"seen": self._detector.state(), "left_out": self._left_out}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._on_spike == "rollback" and not self._is_driven:
            raise ValueError(
                "on_spike='rollback' needs SpikeCallback.train(trainer) in place of trainer.train()"
            )
        if args.restore_callback_states_from_checkpoint:  # it would make another SpikeCallback
            raise ValueError(
                "restore_callback_states_from_checkpoint must be False, got True: "
                "SpikeCallback restores itself"
            )
        states: Any = state.stateful_callbacks
        saved = _own_state(states) if state.global_step else None
        self._detector.restore(self._fresh if saved is None else saved["seen"])
        self._left_out = [] if saved is None else [list(entry) for entry in saved["left_out"]]
        states.setdefault(SpikeCallback.__name__, self.state())  # the Trainer needs it to save another

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return control
        spike = self._observe(state.global_step, logs)
        if spike is None:
            return control
        entry = self._respond(spike, state, _checkpoint_steps(args.output_dir))
        self.spikes.append({"step": spike.step, **entry})
        logger.warning(
            "spike at step %d: %s; action: %s", spike.step, ", ".join(spike.reasons), entry["action"]
        )
        if self._logits is not None:
            self._logits.record({"spike": entry}, state.global_step)
        control.should_training_stop |= entry["action"] != "report"
        control.should_save |= entry["action"] == "stop"
        self._to_step = entry.get("to_step")
        return control

    def train(
        self, trainer: Trainer, resume_from_checkpoint: str | os.PathLike[str] | None = None
    ) -> TrainOutput:
        """Train as `trainer.train` does, with rollbacks.

        Args:
            trainer: has this callback; it is attached if not.
            resume_from_checkpoint: folder of a checkpoint of the Trainer.

        Raises:
            ValueError: the Trainer saves no checkpoints from which it can resume.
        """
        args = trainer.args
        if self._on_spike == "rollback" and (args.save_strategy == "no" or args.save_only_model):
            raise ValueError(
                "on_spike='rollback' needs checkpoints: save_strategy must not be 'no', save_only_model not "
                "True"
            )
        if self not in trainer.callback_handler.callbacks:
            attach(trainer, self)
        resume = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
        with self._driving(trainer):
            while True:
                self._to_step = None
                output = trainer.train(resume_from_checkpoint=resume)
                if self._to_step is None:
                    return output
                resume = self._roll_back(trainer, self._to_step)

    def _observe(self, step: int, logs: dict[str, Any]) -> Spike | None:
        reading = None
        if self._logits is not None and self._logits.reading_step == step:
            reading = self._logits.reading
        alarm = self._detector.alarm
        by_head = None if reading is None or alarm is None else getattr(reading, ALARM_MEASUREMENTS[alarm])
        max_logit = None if reading is None else reading.max_logit
        return self._detector.observe(step, logs["loss"], logs.get("grad_norm", 0.0), max_logit, by_head)

    def _respond(self, spike: Spike, state: TrainerState, checkpoints: list[int]) -> dict[str, Any]:
        entry = {"reasons": list(spike.reasons), "onset": spike.onset, "action": self._on_spike}
        if self._on_spike != "rollback":
            return entry
        older = [step for step in checkpoints if step < spike.onset]
        good = [step for step in older if step <= spike.onset - self._rollback_steps]
        to_step = good[-1] if good else min(older, default=None)
        if to_step is None or len(self._left_out) >= self._max_rollbacks:
            return entry | {"action": "stop"}
        skipped = max(self._skip_batches, state.global_step - to_step)
        self._left_out = [*self._left_out, [to_step, skipped]]
        return entry | {"to_step": to_step, "batches_skipped": self.batches_left_out}

    def _roll_back(self, trainer: Trainer, to_step: int) -> str:
        """Rename later checkpoints, and add to the one to return to which batches are left out after it."""
        folder = Path(trainer.args.output_dir or ".")
        attempt = len(self._left_out)
        if trainer.args.should_save:
            for step in _checkpoint_steps(folder):
                if step > to_step:
                    name = f"checkpoint-{step}"
                    os.replace(folder / name, folder / f"abandoned-{attempt}-{name}")
            file = folder / f"checkpoint-{to_step}" / _STATE_FILE
            content = json.loads(file.read_text())
            seen = (_own_state(content["stateful_callbacks"]) or {"seen": self._fresh})["seen"]
            saved = {"args": {}, "attributes": {"seen": seen, "left_out": self._left_out}}
            content["stateful_callbacks"][SpikeCallback.__name__] = saved
            partial = file.with_name(f".{file.name}.partial")
            partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
            os.replace(partial, file)
        trainer.accelerator.wait_for_everyone()
        return str(folder / f"checkpoint-{to_step}")

    @contextmanager
    def _driving(self, trainer: Trainer) -> Iterator[None]:
        """Let the Trainer take its batches from here, so that some can be left out."""
        batches = _Batches(trainer, self)
        self._is_driven = True
        trainer.get_batch_samples = batches.take
        trainer.add_callback(batches)
        try:
            yield
        finally:
            self._is_driven = False
            del trainer.get_batch_samples
            trainer.callback_handler.callbacks.remove(batches)

    @property
    def batches_left_out(self) -> int:
        """Number of batches that rollbacks have left out so far."""
        return sum(count for _, count in self._left_out)


class _Batches(TrainerCallback):
    """The batches of a Trainer: after rollbacks that left out n, step s takes those of step s + n without
    rollbacks."""

    def __init__(self, trainer: Trainer, spikes: SpikeCallback) -> None:
        self._trainer, self._spikes = trainer, spikes
        self._take = trainer.get_batch_samples
        self._stream: Iterator[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        skipped = self._spikes.batches_left_out
        loader, accumulated = kwargs["train_dataloader"], args.gradient_accumulation_steps
        self._stream = _stream(loader, state.global_step, skipped, accumulated) if skipped else None

    def take(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Take what `Trainer.get_batch_samples` takes."""
        return self._take(self._stream or epoch_iterator, num_batches, device)


def _stream(loader: Any, steps: int, skipped: int, accumulated: int) -> Iterator[Any]:
    """Yield the micro-batches of epoch after epoch without those of some steps, and of some more."""
    size: int | None = len(loader) if has_length(loader) else None
    steps_per_epoch = None if size is None else -(-size // accumulated)
    epoch, step = (0, steps) if steps_per_epoch is None else divmod(steps, steps_per_epoch)
    offset = (step + skipped) * accumulated
    while size is not None and offset >= size:
        epoch, offset = epoch + 1, offset - size
    while True:
        part: Any = skip_first_batches(loader, offset) if offset else loader
        _set_epoch(part, epoch)
        is_empty = True
        for batch in part:
            is_empty = False
            yield batch
        if is_empty and not offset:
            return
        epoch, offset = epoch + 1, 0


def _set_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of a shuffled loader, as the Trainer does."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    for part in (loader, sampler):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _own_state(states: Any) -> dict[str, Any] | None:
    """Return what a checkpoint keeps of the SpikeCallback; the Trainer makes lists of several of one
    class."""
    saved: Any = (states or {}).get(SpikeCallback.__name__)
    saved = saved[0] if isinstance(saved, list) and saved else saved
    return None if saved is None else saved["attributes"]


def _checkpoint_steps(folder: str | os.PathLike[str] | None) -> list[int]:
    """Return the steps of the Trainer's checkpoints, ascending."""
    path = Path(folder or ".")
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    found = [re.fullmatch(r"checkpoint-(\d+)", name) for name in names]
    steps = sorted(int(match[1]) for match in found if match)
    return [step for step in steps if (path / f"checkpoint-{step}" / _STATE_FILE).is_file()]

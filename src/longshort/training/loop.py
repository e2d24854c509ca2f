"""The training loop: from a `TrainConfig` to a trained model in a run's folder.

All randomness comes from the seed: the initial weights, and each batch together with the number of its step.
So a run that goes on from a checkpoint computes bit for bit what it would have computed without the break
(same machine, threads and versions, fp32); one killed before its first checkpoint starts again from step 0.
After a rollback the run starts once more from a checkpoint, with batches further on, as the state in it says:
step s takes batch s - 1 + `batches_skipped`.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longshort.data import Batch, Batches, DataFolder, validation_windows
from longshort.model import LongShortForCausalLM
from longshort.stability import MAX_LOGITS, AttentionMonitor, QKClip, Reading, SpikeDetector
from longshort.training.checkpoints import (
    TrainState,
    keep_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_partial_checkpoints,
    rewind,
    save_checkpoint,
)
from longshort.training.config import TrainConfig
from longshort.training.interrupts import Interrupts
from longshort.training.metrics import MetricsLog
from longshort.training.optimization import learning_rate_at, make_optimizer, optimizer_step, validation_loss
from longshort.training.parallel import Ranks, connect
from longshort.training.rollback import checkpoints_to_keep, describe, respond
from longshort.training.run import (
    RunConfig,
    create_run,
    current_versions,
    open_same_data,
    plan_run,
    read_run,
    write_config,
)


class Progress:
    """What a run tells whoever watches it, on its main process; override what you want to show."""

    def on_start(self, run: RunConfig, step: int) -> None:
        """Training begins, or goes on, after `step` steps."""

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        """A step is done; `record` is its line of metrics.jsonl, if it has one."""

    def on_message(self, text: str) -> None:
        """Something happened that a reader should know."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` or `resume` ended.

    Attributes:
        run: the run's folder.
        step: optimizer steps done; a checkpoint of this step is there.
        steps: how many the run is to have.
        signal: number of the signal that stopped it early; None: none did.
        stopped_by_spike: whether a spike ended it.
    """

    run: Path
    step: int
    steps: int
    signal: int | None
    stopped_by_spike: bool = False

    @property
    def exit_code(self) -> int:
        """For the shell: 0; 128 + the signal's number (130 after Ctrl-C); 3 after a spike."""
        if self.stopped_by_spike:
            return 3
        return 0 if self.signal is None else 128 + self.signal


def train(settings: TrainConfig, progress: Progress | None = None) -> Outcome:
    """Start a run in the folder `settings.out`.

    Ctrl-C and SIGTERM let the current step end, write a checkpoint and return; a second Ctrl-C raises
    KeyboardInterrupt at once. A loss that is not finite does not stop the run, unless `on_spike` says so:
    divergence is a result.

    Raises:
        ValueError: a setting does not fit the preset, the data or the machine; no file was touched.
        FileNotFoundError: there is no such data folder.
        FileExistsError: the run's folder exists and is not empty.
        OSError: a file could not be written; earlier checkpoints are whole.
    """
    with connect(settings.device) as ranks:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        run, data = plan_run(settings)
        job = _prepare(run, data, ranks)
        ranks.barrier()  # all have seen that the folder is free
        if ranks.is_main:
            create_run(run, data)
        ranks.barrier()
        return _run_steps(job, ranks, progress or Progress())


def resume(
    run: Path | str,
    *,
    steps: int | None = None,
    threads: int | None = None,
    data: Path | str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Go on with a run from its latest checkpoint, with the settings of its config.json.

    Args:
        run: the run's folder.
        steps: new number of steps. The schedule of the learning rate stays: warm-up and cosine were laid out
            when the run began, and after the cosine's end the rate stays at `min_learning_rate`.
        threads: CPU threads from now on; another number may change the last bits of the losses.
        data: where the data folder is now, if it was moved.
        progress: is told what happens.

    Raises:
        FileNotFoundError: there is no such run, or its data is not where it was.
        ValueError: an argument is out of its range, or the data is not the run's.
        BlockingIOError: another process is training this run.
        OSError: as in `train`.
    """
    told = {"steps": steps, "threads": threads, "data": None if data is None else Path(data).absolute()}
    changes = {name: value for name, value in told.items() if value is not None}
    planned = read_run(run)
    planned = replace(planned, training=replace(planned.training, **changes))
    progress = progress or Progress()
    with connect(planned.training.device) as ranks:
        assert planned.training.threads is not None
        torch.set_num_threads(planned.training.threads)
        job = _prepare(planned, open_same_data(planned), ranks)
        if ranks.is_main and planned.versions != current_versions():
            progress.on_message(
                f"started with {planned.versions}, going on with {current_versions()}: "
                "the last bits of the losses may differ"
            )
        return _run_steps(job, ranks, progress)


@dataclass(frozen=True)
class _Job:
    """What the steps of a run work on, ready before its folder is touched."""

    run: RunConfig
    model: LongShortForCausalLM
    batches: Batches
    windows: Batch | None
    """For the validation loss."""


def _prepare(run: RunConfig, data: DataFolder, ranks: Ranks) -> _Job:
    settings = run.training
    length = settings.sequence_length
    assert length is not None
    if settings.batch_size % ranks.world_size:
        raise ValueError(
            f"--batch-size must be a multiple of the {ranks.world_size} processes, got {settings.batch_size}"
        )
    order: dict[str, Any] = {
        "token_order": settings.token_order,
        "interleave": settings.interleave,
        "document_start": run.document_start,
    }
    windows = None
    validation_length = min(length, len(data.validation.tokens) - 1)
    if settings.token_order != "text":
        validation_length = length  # a shorter window has its tokens in another order
    if settings.evaluate_every and validation_length > 0:
        windows = validation_windows(data.validation, validation_length, settings.validation_windows, **order)
    batches = Batches(data.train, length, settings.batch_size, settings.seed, **order)
    return _Job(run, run.build_model(), batches, windows)


def _run_steps(job: _Job, ranks: Ranks, progress: Progress) -> Outcome:
    folder = job.run.training.out
    log = MetricsLog(folder) if ranks.is_main else None  # keeps other processes out of the folder
    try:
        ranks.barrier()
        return _go_on(job, ranks, progress, log)
    finally:
        if log is not None:
            log.close()


def _go_on(job: _Job, ranks: Ranks, progress: Progress, log: MetricsLog | None) -> Outcome:
    """Train from the latest checkpoint on, and once more from there whenever a rollback has set it back."""
    settings = job.run.training
    training = _Training(job, ranks, progress, log)
    state = training.load()
    if settings.steps < state.step:
        raise ValueError(f"--steps must be at least {state.step}, the steps done, got {settings.steps}")
    training.prepare()
    if log is not None:
        remove_partial_checkpoints(settings.out)
        write_config(settings.out, job.run)
    training.begin(state)
    if log is not None:
        progress.on_start(job.run, state.step)
        if state.step == settings.steps:
            progress.on_message(f"all {state.step} steps are done; --steps goes further")
    with Interrupts(is_patient=ranks.world_size > 1) as interrupts:
        while (outcome := training.run(state, interrupts)) is None:
            state = training.load()
            training.begin(state)
    ranks.barrier()  # the last checkpoint is there
    return outcome


class _Training:
    """What the steps of a run share. Only the main process has a log; only it writes."""

    def __init__(self, job: _Job, ranks: Ranks, progress: Progress, log: MetricsLog | None):
        self._job, self._ranks, self._progress, self._log = job, ranks, progress, log
        self._settings = settings = job.run.training
        self._model = job.model.to(ranks.device).train()  # pyright: ignore[reportArgumentType]
        self._optimizer = make_optimizer(self._model, settings)
        self._detector = None if settings.on_spike is None else SpikeDetector()
        self._monitor = AttentionMonitor(self._model, job.run.band, row_range=settings.monitor_row_range)
        self._clip = self._clip_monitor = None
        if settings.qk_clip is not None:
            self._clip = QKClip(self._model, settings.qk_clip)
            self._clip_monitor = AttentionMonitor(self._model, None)  # what the clip needs and no more
        self._max_logits: dict[str, Any] = {}  # as last measured

    def load(self) -> TrainState:
        """Go back to the latest checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self._settings.out)
        if checkpoint is None:
            return TrainState(step=0, tokens=0, seed=self._settings.seed)
        state = load_checkpoint(checkpoint, self._model, self._optimizer)
        if self._detector is not None and state.spikes is not None:
            self._detector.restore(state.spikes)
        return state

    def prepare(self) -> None:
        """Make the loaded model ready for its passes."""
        if self._settings.gradient_checkpointing:
            _checkpoint_activations(self._model)
        if self._settings.compile:
            self._model.compile()
        self._trained = self._ranks.wrap(self._model)

    def begin(self, state: TrainState) -> None:
        """Let the metrics go on after the steps that are done."""
        if self._log is None:
            return
        last_line = self._log.begin(state.step, self._settings.tensorboard, state.attempt) or {}
        self._max_logits = {name: last_line[name] for name in MAX_LOGITS if name in last_line}
        if self._settings.on_spike == "rollback" and latest_checkpoint(self._settings.out) is None:
            self._save(state)  # what the first rollbacks go back to

    def run(self, state: TrainState, interrupts: Interrupts) -> Outcome | None:
        """Do the steps after `state`; None: a rollback has made another checkpoint the latest."""
        settings, ranks, log, progress = self._settings, self._ranks, self._log, self._progress
        busy_seconds, busy_tokens, was_finite = 0.0, 0, True
        while state.step < settings.steps:
            step = state.step + 1
            is_monitored = _is_due(step, settings.monitor_every, settings.steps)
            is_monitored |= step == 1 and settings.monitor_every > 0
            is_evaluated = _is_due(step, settings.evaluate_every, settings.steps)
            has_line = _is_due(step, settings.log_every, settings.steps) or is_monitored or is_evaluated
            record: dict[str, Any] | None = None
            learning_rate = learning_rate_at(settings, state.step)
            monitor = self._monitor if is_monitored else self._clip_monitor
            started = time.perf_counter()
            batch = self._job.batches.batch(state.step + state.batches_skipped, ranks.rank, ranks.world_size)
            with nullcontext() if monitor is None else monitor.observing():
                loss, norm = optimizer_step(
                    self._trained, self._optimizer, batch, learning_rate, settings, ranks
                )
            reading = None if monitor is None else monitor.reading(ranks.reduce_max, ranks.reduce_mean)
            clipped = 0
            if self._clip is not None and reading is not None:
                clipped = self._clip.apply(reading.max_logit_by_head)
            tokens = settings.batch_size * batch.input_ids.shape[1]
            state = replace(state, step=step, tokens=state.tokens + tokens)
            busy_tokens += tokens
            spike: dict[str, Any] | None = None
            if has_line or self._detector is not None:
                loss, norm = ranks.reduce_mean(torch.stack([loss, norm])).tolist()  # waits for a GPU
                spike = self._respond_to_spike(loss, norm, reading, state)
            busy_seconds += time.perf_counter() - started
            if has_line or spike is not None:
                record = {
                    "step": step,
                    "tokens": state.tokens,
                    "loss": loss,
                    "learning_rate": learning_rate,
                    "grad_norm": norm,
                    "tokens_per_second": busy_tokens / busy_seconds,
                }
                busy_seconds, busy_tokens = 0.0, 0
                measured: dict[str, Any] = {}
                if is_monitored and reading is not None:
                    measured = reading.as_metrics()
                    self._max_logits = {name: measured[name] for name in MAX_LOGITS}
                record |= self._max_logits | measured
                if is_evaluated and self._job.windows is not None:
                    record["validation_loss"] = validation_loss(
                        self._model, self._job.windows, settings, ranks
                    )
                if self._clip is not None:
                    record["qk_clipped"] = clipped
                if state.attempt:
                    record["attempt"] = state.attempt
                if spike is not None:
                    record["spike"] = spike
                if log is not None:
                    log.write(record)
                    if self._detector is None and was_finite and not math.isfinite(record["loss"]):
                        progress.on_message(f"the loss is not finite at step {step}; the run goes on")
                    was_finite = math.isfinite(record["loss"])
            if log is not None:
                progress.on_step(step, record)
                if spike is not None:
                    progress.on_message(describe(spike, settings, state))
            action = None if spike is None else spike["action"]
            if spike is not None and action == "rollback":
                self._roll_back(spike, state)
                return None
            is_interrupted = ranks.any(interrupts.signal is not None)
            is_stopped = is_interrupted or action == "stop"
            if log is not None and (is_stopped or _is_due(step, settings.checkpoint_every, settings.steps)):
                if is_interrupted:
                    progress.on_message("stopping; a checkpoint is written first, Ctrl-C again stops at once")
                log.sync()
                self._save(state)
            if log is not None and is_stopped and step < settings.steps:
                command = resume_command(settings.out, ranks)
                progress.on_message(f"stopped after step {step}; to go on: {command}")
            if action == "stop":
                return Outcome(settings.out, step, settings.steps, None, stopped_by_spike=True)
            if is_interrupted and step < settings.steps:
                return Outcome(settings.out, step, settings.steps, interrupts.signal or signal.SIGTERM)
        return Outcome(settings.out, state.step, settings.steps, None)

    def _respond_to_spike(
        self, loss: float, norm: float, reading: Reading | None, state: TrainState
    ) -> dict[str, Any] | None:
        """The entry of metrics.jsonl for a spike, if the step that was just done shows one."""
        if self._detector is None:
            return None
        spike = self._detector.observe(state.step, loss, norm, None if reading is None else reading.max_logit)
        return None if spike is None else respond(spike, self._settings, state)

    def _roll_back(self, spike: dict[str, Any], state: TrainState) -> None:
        self._ranks.barrier()  # nobody reads checkpoints any more
        if self._log is not None:
            self._log.sync()
            rewind(self._settings.out, spike["to_step"], state.attempt + 1, spike["batches_skipped"])
        self._ranks.barrier()

    def _save(self, state: TrainState) -> None:
        run, onset = self._settings.out, state.step + 1
        if self._detector is not None:
            state = replace(state, spikes=self._detector.state())
            onset -= self._detector.rise_steps  # a slow rise is seen as late
        save_checkpoint(run, self._model, self._optimizer, state)
        keep_checkpoints(run, checkpoints_to_keep(self._settings, onset))


def _checkpoint_activations(model: LongShortForCausalLM) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # the method's name in earlier releases of transformers 5
        model.gradient_checkpointing_enable({"use_reentrant": False})


def resume_command(run: Path, ranks: Ranks) -> str:
    """What to type to go on with a run."""
    program = "longshort"
    if ranks.world_size > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)
        program = f"torchrun --nproc-per-node {local} -m longshort"
    return f"{program} train --resume {shlex.quote(str(run))}"


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps (0: never), and on the last one, is done on this one."""
    return every > 0 and (step % every == 0 or step == last)

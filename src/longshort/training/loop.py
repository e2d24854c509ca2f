"""The training loop: from a `TrainConfig` to a trained model in a run's folder.

All randomness comes from the seed: the initial weights, and each batch together with the number of its step.
So a run that goes on from a checkpoint computes bit for bit what it would have computed without the break
(same machine, threads and versions, fp32); one killed before its first checkpoint starts again from step 0.
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
from longshort.stability import MAX_LOGITS, AttentionMonitor
from longshort.training.checkpoints import (
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    remove_partial_checkpoints,
    save_checkpoint,
)
from longshort.training.config import TrainConfig
from longshort.training.interrupts import Interrupts
from longshort.training.metrics import MetricsLog
from longshort.training.optimization import learning_rate_at, make_optimizer, optimizer_step, validation_loss
from longshort.training.parallel import Ranks, connect
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
        signal: number of the signal that stopped it early; None: it is finished.
    """

    run: Path
    step: int
    steps: int
    signal: int | None

    @property
    def exit_code(self) -> int:
        """For the shell: 0, or 128 + the signal's number (130 after Ctrl-C)."""
        return 0 if self.signal is None else 128 + self.signal


def train(settings: TrainConfig, progress: Progress | None = None) -> Outcome:
    """Start a run in the folder `settings.out`.

    Ctrl-C and SIGTERM let the current step end, write a checkpoint and return; a second Ctrl-C raises
    KeyboardInterrupt at once. A loss that is not finite does not stop the run: divergence is a result.

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
    windows = None
    validation_length = min(length, len(data.validation.tokens) - 1)
    if settings.evaluate_every and validation_length > 0:
        windows = validation_windows(data.validation, validation_length, settings.validation_windows)
    batches = Batches(data.train, length, settings.batch_size, settings.seed)
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
    """Train from the latest checkpoint on. Only the main process has a log; only it writes."""
    run, settings, folder = job.run, job.run.training, job.run.training.out
    model = job.model.to(ranks.device).train()  # pyright: ignore[reportArgumentType]
    optimizer = make_optimizer(model, settings)
    checkpoint = latest_checkpoint(folder)
    state = TrainState(step=0, tokens=0, seed=settings.seed)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, optimizer)
    if settings.steps < state.step:
        raise ValueError(f"--steps must be at least {state.step}, the steps done, got {settings.steps}")
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    if settings.compile:
        model.compile()
    trained = ranks.wrap(model)
    monitor = AttentionMonitor(model, run.band)
    max_logits: dict[str, Any] = {}  # as last measured
    if log is not None:
        remove_partial_checkpoints(folder)
        write_config(folder, run)
        last_line = log.begin(state.step, settings.tensorboard) or {}
        max_logits = {name: last_line[name] for name in MAX_LOGITS if name in last_line}
        progress.on_start(run, state.step)
        if state.step == settings.steps:
            progress.on_message(f"all {state.step} steps are done; --steps goes further")

    busy_seconds, busy_tokens, was_finite = 0.0, 0, True
    with Interrupts(is_patient=ranks.world_size > 1) as interrupts:
        while state.step < settings.steps:
            step = state.step + 1
            is_monitored = _is_due(step, settings.monitor_every, settings.steps)
            is_monitored |= step == 1 and settings.monitor_every > 0
            is_evaluated = _is_due(step, settings.evaluate_every, settings.steps)
            has_line = _is_due(step, settings.log_every, settings.steps) or is_monitored or is_evaluated
            record: dict[str, Any] | None = None
            learning_rate = learning_rate_at(settings, state.step)
            started = time.perf_counter()
            batch = job.batches.batch(state.step, ranks.rank, ranks.world_size)
            with monitor.observing() if is_monitored else nullcontext():
                loss, norm = optimizer_step(trained, optimizer, batch, learning_rate, settings, ranks)
            tokens = settings.batch_size * batch.input_ids.shape[1]
            state = replace(state, step=step, tokens=state.tokens + tokens)
            busy_tokens += tokens
            if has_line:
                loss, norm = ranks.reduce_mean(torch.stack([loss, norm])).tolist()  # waits for a GPU
            busy_seconds += time.perf_counter() - started
            if has_line:
                record = {
                    "step": step,
                    "tokens": state.tokens,
                    "loss": loss,
                    "learning_rate": learning_rate,
                    "grad_norm": norm,
                    "tokens_per_second": busy_tokens / busy_seconds,
                }
                busy_seconds, busy_tokens = 0.0, 0
                reading: dict[str, Any] = {}
                if is_monitored:
                    reading = monitor.reading(ranks.reduce_max, ranks.reduce_mean).as_metrics()
                    max_logits = {name: reading[name] for name in MAX_LOGITS}
                record |= max_logits | reading
                if is_evaluated and job.windows is not None:
                    record["validation_loss"] = validation_loss(model, job.windows, settings, ranks)
                if log is not None:
                    log.write(record)
                    if was_finite and not math.isfinite(record["loss"]):
                        progress.on_message(f"the loss is not finite at step {step}; the run goes on")
                    was_finite = math.isfinite(record["loss"])
            if log is not None:
                progress.on_step(step, record)
            is_interrupted = ranks.any(interrupts.signal is not None)
            is_saved = is_interrupted or _is_due(step, settings.checkpoint_every, settings.steps)
            if log is not None and is_saved:
                if is_interrupted:
                    progress.on_message("stopping; a checkpoint is written first, Ctrl-C again stops at once")
                log.sync()
                save_checkpoint(folder, model, optimizer, state, settings.keep_checkpoints)
            if is_interrupted and step < settings.steps:
                ranks.barrier()
                if log is not None:
                    command = resume_command(folder, ranks)
                    progress.on_message(f"stopped after step {step}; to go on: {command}")
                return Outcome(folder, step, settings.steps, interrupts.signal or signal.SIGTERM)
    ranks.barrier()  # the last checkpoint is there
    return Outcome(folder, state.step, settings.steps, None)


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

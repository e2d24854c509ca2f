"""The training loop: from a `TrainConfig` to a trained model in a run's folder.

All randomness depends on the seed: the initial weights, and each batch together with the number of its step.
So a run that is resumed from a checkpoint computes bit for bit what it would have computed without the break
(same machine, threads and versions, fp32); one killed before its first checkpoint starts again from step 0.
After a rollback the run starts again from a checkpoint with later batches: by the state in the checkpoint,
step s takes batch s - 1 + `batches_skipped`.
"""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longshort.checks import flag
from longshort.stability import Reading, SpikeDetector
from longshort.stability.alarms import ALARM_MEASUREMENTS
from longshort.training.checkpoints import (
    ShardsBeingSaved,
    TrainState,
    keep_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_partial_checkpoints,
    rewind,
    save_checkpoint,
    save_shards,
)
from longshort.training.config import Parallel, TrainConfig
from longshort.training.context_report import describe_context
from longshort.training.interrupts import Interrupts
from longshort.training.job import Job, PrepareModel, checkpoint_activations, prepare_job
from longshort.training.metrics import MetricsLog
from longshort.training.optimization import Objective, learning_rate_at, make_optimizer, optimizer_step
from longshort.training.parallel import Ranks, connect
from longshort.training.progress import Progress, RunOutcome, resume_command
from longshort.training.recorder import Recorder, Taken, is_due
from longshort.training.rollback import checkpoints_to_keep, describe, respond
from longshort.training.run import (
    create_run,
    current_versions,
    open_same_data,
    plan_run,
    read_run,
    write_config,
)
from longshort.training.utilization import seconds_at_peak
from longshort.training.validation import Validation


def train(
    settings: TrainConfig, progress: Progress | None = None, prepare_model: PrepareModel | None = None
) -> RunOutcome:
    """Start a run in the folder `settings.out`.

    After Ctrl-C or SIGTERM the current step ends, a checkpoint is written and the call returns; a second
    Ctrl-C raises KeyboardInterrupt at once. A loss that is not finite does not stop the run, unless
    `on_spike` asks for it: divergence is a result.

    Args:
        settings: the settings of the run.
        progress: reports what happens.
        prepare_model: changes the model, on the CPU, with its initial weights, before the first step. The
            run's config does not record it: `resume` must be given it again.

    Raises:
        ValueError: a setting does not fit the preset, the data or the machine; no file was touched.
        FileNotFoundError: there is no such data folder.
        FileExistsError: the run's folder exists and is not empty.
        OSError: a file could not be written; earlier checkpoints are whole.
    """
    with _connected(settings) as ranks:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        run, data = plan_run(settings)
        job = prepare_job(run, data, ranks, prepare_model)
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
    parallel: Parallel | None = None,
    shards: int | None = None,
    context_parallel: int | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
    prepare_model: PrepareModel | None = None,
) -> RunOutcome:
    """Resume a run from its latest checkpoint, with the settings of its config.json.

    Args:
        run: the run's folder.
        steps: new number of steps. The schedule of the learning rate stays: warm-up and cosine were set when
            the run began, and after the cosine's end the rate stays at `min_learning_rate`.
        threads: CPU threads from now on; another number may change the last bits of the losses.
        data: new path of the data folder, if it was moved.
        parallel: new way of several processes. Their number may be another one in any case.
        shards: new number of processes among which the model is cut.
        context_parallel: new number of processes that share each sequence.
        timeout: new number of seconds for which a process waits for the others.
        progress: reports what happens.
        prepare_model: the one that `train` was given; it is called before the checkpoint's weights are
            loaded.

    Raises:
        FileNotFoundError: there is no such run, or its data was moved.
        ValueError: an argument is out of its range, or the data is not the run's.
        BlockingIOError: another process is training this run.
        OSError: as in `train`.
    """
    given = {
        "steps": steps,
        "threads": threads,
        "data": None if data is None else Path(data).absolute(),
        "parallel": parallel,
        "shards": shards,
        "context_parallel": context_parallel,
        "timeout": timeout,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if parallel == "ddp":
        changes |= {"shards": None, "async_checkpoints": False}
    if context_parallel == 1:
        changes |= {"gather_memory": None}
    planned = read_run(run)
    planned = replace(planned, training=replace(planned.training, **changes))
    progress = progress or Progress()
    with _connected(planned.training) as ranks:
        assert planned.training.threads is not None
        torch.set_num_threads(planned.training.threads)
        job = prepare_job(planned, open_same_data(planned), ranks, prepare_model)
        if ranks.is_main and planned.versions != current_versions():
            progress.on_message(
                f"started with {planned.versions}, continuing with {current_versions()}: "
                "the last bits of the losses may differ"
            )
        return _run_steps(job, ranks, progress)


def _connected(settings: TrainConfig) -> AbstractContextManager[Ranks]:
    return connect(
        settings.device,
        parallel=settings.parallel,
        shards=settings.shards,
        context_parallel=settings.context_parallel,
        gather_memory=settings.gather_memory,
        timeout=settings.timeout,
        saves_in_background=settings.async_checkpoints,
        facts=_facts(settings),
    )


def _facts(settings: TrainConfig) -> dict[str, Any]:
    """Return what all processes must agree on: not where files are on each machine, nor its threads."""
    own = ("data", "out", "threads", "peak_tflops")
    facts = {flag(name): value for name, value in vars(settings).items() if name not in own}
    return facts | current_versions()


def _run_steps(job: Job, ranks: Ranks, progress: Progress) -> RunOutcome:
    folder = job.run.training.out
    log = MetricsLog(folder) if ranks.is_main else None  # keeps other processes out of the folder
    with nullcontext() if log is None else closing(log):
        ranks.barrier()
        return _start(job, ranks, progress, log)


def _start(job: Job, ranks: Ranks, progress: Progress, log: MetricsLog | None) -> RunOutcome:
    """Train from the latest checkpoint on, or from the start."""
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
        if ranks.context is not None:
            progress.on_message(describe_context(job.run, ranks))
        if state.step == settings.steps:
            progress.on_message(f"all {state.step} steps are done; --steps adds more")
    with Interrupts(is_patient=ranks.world_size > 1) as interrupts:
        outcome = training.run(state, interrupts)
    ranks.barrier()  # the last checkpoint is there
    return outcome


class _Training:
    """The training of one run, step by step. Only the main process has a log; only it writes.

    A step that is neither recorded nor watched for spikes reads nothing from the device: the host is ahead of
    a GPU by up to the steps between two lines.
    """

    def __init__(self, job: Job, ranks: Ranks, progress: Progress, log: MetricsLog | None):
        self._job, self._ranks, self._progress, self._log = job, ranks, progress, log
        self._settings = settings = job.run.training
        model: Any = job.model
        self._model = (model if ranks.shards is not None else model.to(ranks.device)).train()
        self._objective = Objective(self._model, settings)
        self._optimizer = make_optimizer(self._model, settings)
        self._detector = None if settings.on_spike is None else SpikeDetector(alarm=settings.alarm)
        self._saving: tuple[int, ShardsBeingSaved] | None = None
        self._monitor, self._update_entropy = job.make_monitor()
        self._clip, self._clip_monitor = job.make_clip()
        validation = None if job.windows is None else Validation(job, self._objective, ranks)
        self._recorder = Recorder(settings, log, progress, validation, seconds_at_peak(job.run, ranks))

    def load(self) -> TrainState:
        """Go back to the latest checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self._settings.out)
        if checkpoint is None:
            return TrainState(step=0, tokens=0, seed=self._settings.seed)
        state = load_checkpoint(checkpoint, self._model, self._optimizer, self._update_entropy)
        if self._detector is not None and state.spikes is not None:
            self._detector.restore(state.spikes)
        return state

    def prepare(self) -> None:
        """Make the loaded model ready for its passes."""
        if self._settings.gradient_checkpointing:
            checkpoint_activations(self._model, keeps_exchanges=self._ranks.context is not None)
        if self._settings.compile:
            self._objective.compile()
        self._trained = self._ranks.wrap(self._objective)

    def begin(self, state: TrainState) -> None:
        """Continue the metrics after the steps that are done."""
        self._recorder.begin(state)
        if self._settings.on_spike == "rollback" and latest_checkpoint(self._settings.out) is None:
            self._ranks.barrier()  # all have looked
            self._save(state)  # the first rollbacks go back to this one

    def run(self, state: TrainState, interrupts: Interrupts) -> RunOutcome:
        """Run the steps after `state`: each is taken, recorded, and checked for a spike."""
        settings = self._settings
        self._recorder.start_interval()
        is_done = state.step >= settings.steps or self._ranks.any(self._recorder.is_at_goal)
        while not is_done:
            state, taken = self._step(state)
            spike = self._observe(state, taken)
            action = None if spike is None else spike["action"]
            if spike is not None and action == "rollback":
                state = self._roll_back(spike, state)
                continue
            is_interrupted = self._ranks.any(interrupts.signal is not None)
            is_done = state.step >= settings.steps or self._recorder.is_at_goal
            self._finish_saving(wait=False)
            self._checkpoint(state, is_interrupted, is_done, action == "stop")
            if action == "stop":
                return RunOutcome(settings.out, state.step, settings.steps, None, stopped_by_spike=True)
            if is_interrupted and not is_done:
                number = interrupts.signal or signal.SIGTERM
                return RunOutcome(settings.out, state.step, settings.steps, number)
        return RunOutcome(settings.out, state.step, settings.steps, None)

    def _step(self, state: TrainState) -> tuple[TrainState, Taken]:
        """Take one optimizer step, measure its attention if that is due, and apply QK-clip after it."""
        settings, ranks, step = self._settings, self._ranks, state.step + 1
        every = settings.monitor_every
        is_monitored = is_due(step, every, settings.steps) or (step == 1 and every > 0)
        monitor = self._monitor if is_monitored else self._clip_monitor
        batch = self._job.batches.batch(state.step + state.batches_skipped, ranks.data_rank, ranks.data_size)
        learning_rate = learning_rate_at(settings, state.step)
        with nullcontext() if monitor is None else monitor.observing():
            loss, norm = optimizer_step(self._trained, self._optimizer, batch, learning_rate, settings, ranks)
        measured = None if monitor is None else monitor.measurements(ranks.reduce_max, ranks.reduce_mean)
        clipped = None
        if self._clip is not None and measured is not None:
            clipped = self._clip.apply_on_device(measured.max_logit_by_head)
        tokens = settings.batch_size * batch.input_ids.shape[1]
        self._recorder.add_tokens(tokens)
        state = replace(state, step=step, tokens=state.tokens + tokens)
        return state, Taken(torch.stack([loss, norm]), learning_rate, measured, is_monitored, clipped)

    def _observe(self, state: TrainState, taken: Taken) -> dict[str, Any] | None:
        """Record the step, if that is due; return the entry of its spike, if it shows one."""
        record = spike = None
        has_line = self._recorder.is_due(state.step, taken)
        if has_line or self._detector is not None:
            loss, norm = self._ranks.reduce_mean(taken.loss_and_norm).tolist()  # waits for a GPU
            reading = None if taken.measurements is None else taken.measurements.read()
            spike = self._look_for_spike(loss, norm, reading, taken.is_monitored, state)
            if has_line or spike is not None:
                record = self._recorder.write(state, taken, reading, loss, norm, spike)
        if self._log is not None:
            self._progress.on_step(state.step, record)
            if spike is not None:
                self._progress.on_message(describe(spike, self._settings, state))
        return spike

    def _look_for_spike(
        self, loss: float, norm: float, reading: Reading | None, is_monitored: bool, state: TrainState
    ) -> dict[str, Any] | None:
        """Return the entry of metrics.jsonl for a spike, if the last step shows one."""
        if self._detector is None:
            return None
        max_logit = None if reading is None else reading.max_logit
        by_head = None
        if is_monitored and self._settings.alarm is not None:
            by_head = getattr(reading, ALARM_MEASUREMENTS[self._settings.alarm])
        spike = self._detector.observe(state.step, loss, norm, max_logit, by_head)
        if spike is None:
            return None
        if self._settings.on_spike == "rollback":
            self._finish_saving(wait=True)  # the response must not depend on how fast the disk is
        return respond(spike, self._settings, state)

    def _checkpoint(self, state: TrainState, is_interrupted: bool, is_done: bool, is_stopped: bool) -> None:
        """Write a checkpoint, if one is due or the run ends here."""
        settings = self._settings
        is_regular = is_due(state.step, settings.checkpoint_every, settings.steps)
        if not (is_regular or is_interrupted or is_done or is_stopped):
            return
        if self._log is not None:
            if is_interrupted:
                text = "stopping; a checkpoint is written first, Ctrl-C again stops at once"
                self._progress.on_message(text)
            self._log.sync()
        self._save(state)
        if is_interrupted or is_done or is_stopped:
            self._finish_saving(wait=True)
        if self._log is None:
            return
        if (is_interrupted and not is_done) or (is_stopped and state.step < settings.steps):
            command = resume_command(settings.out, self._ranks)
            self._progress.on_message(f"stopped after step {state.step}; to resume: {command}")

    def _roll_back(self, spike: dict[str, Any], state: TrainState) -> TrainState:
        """Make an earlier checkpoint the latest, and start from it once more."""
        self._finish_saving(wait=True)
        self._ranks.barrier()  # no process reads checkpoints any more
        if self._log is not None:
            self._log.sync()
            rewind(self._settings.out, spike["to_step"], state.attempt + 1, spike["batches_skipped"])
        self._ranks.barrier()
        state = self.load()
        self.begin(state)
        return state

    def _save(self, state: TrainState) -> None:
        run, onset = self._settings.out, state.step + 1
        if self._detector is not None:
            state = replace(state, spikes=self._detector.state())
            onset -= self._detector.rise_steps  # a slow rise is detected this much later
        ranks = self._ranks
        ranks.wait()
        with self._recorder.paused():
            if ranks.shards is not None:
                self._finish_saving(wait=True)
                in_background = self._settings.async_checkpoints
                parts = self._model, self._optimizer, state, ranks, self._update_entropy
                self._saving = onset, save_shards(run, *parts, in_background=in_background)
                if not in_background:
                    self._finish_saving(wait=True)
            elif ranks.is_main:
                save_checkpoint(run, self._model, self._optimizer, state, self._update_entropy)
                keep_checkpoints(run, checkpoints_to_keep(self._settings, onset))

    def _finish_saving(self, *, wait: bool) -> None:
        """Complete the checkpoint that is being saved in shards, if there is one and it is written.

        Args:
            wait: wait until it is written, on all ranks together.
        """
        if self._saving is not None and (wait or self._saving[1].is_written):
            onset, saving = self._saving
            self._saving = None
            saving.finish()
            if self._ranks.is_main:
                keep_checkpoints(self._settings.out, checkpoints_to_keep(self._settings, onset))
        if wait and self._ranks.shards is not None:
            self._ranks.barrier()  # all see the same checkpoints

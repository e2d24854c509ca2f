"""The trials of language models: training of the model, and a summary of the run in numbers."""

from __future__ import annotations

import fcntl
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from longshort.data import DataFolder, prepare
from longshort.evaluation import measure_needle
from longshort.model import LongShortForCausalLM, parameter_count, training_flops
from longshort.reporting.files import replace_file, strict_json
from longshort.stability import SpikeDetector, divergence_onset, divergence_step
from longshort.studies.framework.comparison import rate_text
from longshort.studies.framework.study import Study, Trial, Workplace
from longshort.studies.language.alarms import alarm_series
from longshort.studies.language.arms import model_config
from longshort.studies.language.export import export_models
from longshort.studies.language.hidden_keys import hide_keys
from longshort.training.checkpoints import latest_checkpoint, load_weights
from longshort.training.config import TrainConfig
from longshort.training.job import PrepareModel
from longshort.training.loop import Progress, resume, train
from longshort.training.metrics import read_metrics
from longshort.training.run import CONFIG_FILE
from longshort.training.trained import open_trained

_TRAINING = ("model", "train", "hidden_keys", "start")  # the settings that determine a run
_DIVERGED = 0.14  # nats per byte of the running loss above its minimum; 0.5 per piece of a usual tokenizer
_MEASURED = 0.02  # the work of a measurement, relative to the training that it follows
_CURVE_POINTS = 60
_DIGITS = 4
_HEAD_POINTS = 20
_LOGITS = (
    "max_logit",
    "max_logit_local",
    "max_logit_global",
    "max_logit_in_band",
    "row_range",
)


class LanguageStudy(Study):
    """A study whose trials train language models."""

    def prepare(self, workplace: Workplace) -> None:
        if not data_folder(workplace).is_dir():
            prepare(workplace.source, data_folder(workplace), tokenizer=workplace.tokenizer)

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        return train_language_model(trial, workplace)

    def export(self, trials: Sequence[Trial], workplace: Workplace) -> None:
        names = {_name(trial): run_folder(trial.settings, workplace) for trial in trials}
        export_models(names, workplace.folder / self.name / "models")


def _name(trial: Trial) -> str:
    """Name a trial in a path: "MHSA-6e-4-seed-0"."""
    words = f"{trial.arm} {rate_text(trial.settings['train']['learning_rate'])} seed {trial.seed}"
    return re.sub(r"[^\w.-]+", "-", words)


def run_folder(settings: Mapping[str, Any], workplace: Workplace) -> Path:
    """Return the folder of the training run of a trial's settings; trials of the same training share it."""
    training = {name: settings[name] for name in _TRAINING if name in settings}
    return workplace.folder / "runs" / Trial("", 0, training).key


def train_language_model(trial: Trial, workplace: Workplace) -> dict[str, Any]:
    """Train the model of a trial, or resume it, and summarize the run.

    Beside "model" and "train", the trial's settings may hold:

    - "measure": measurements after the training. "needle": the lengths, depths and samples of
      `measure_needle`.
    - "hidden_keys": the share of the keys that `hide_keys` hides in the training passes.
    - "start": the settings of another training, whose last weights are the first of this one.

    Raises:
        InterruptedError: the training was stopped by a signal, after it wrote a checkpoint.
    """
    settings = trial.settings
    with trained_run(settings, workplace) as run:
        result = summarize(run, settings, _bytes_per_token(workplace))
        needle = settings.get("measure", {}).get("needle")
        if needle is not None:
            result["needle"] = needle_cells(run, needle, workplace)
        return result


def measurement_of(trial: Trial, name: str, settings: Mapping[str, Any]) -> Trial:
    """Make a trial that measures the last weights of another's training, which the two share.

    Args:
        trial: the trial of the training.
        name: the name of the measurement, and the key of its settings.
        settings: settings of the measurement.
    """
    return Trial(
        f"{trial.arm}, {name}", trial.seed, {**trial.settings, name: dict(settings)}, _MEASURED * trial.work
    )


@contextmanager
def trained_run(settings: Mapping[str, Any], workplace: Workplace) -> Iterator[Path]:
    """Give the folder of a finished training, alone in it; it is trained, or resumed, if it is not
    finished.

    Args:
        settings: as for `train_language_model`.
        workplace: the environment of trials.

    Raises:
        InterruptedError: the training was stopped by a signal, after it wrote a checkpoint.
    """
    run = run_folder(settings, workplace)
    prepare_model = _preparation(settings, workplace)
    with _alone(run):
        _train(run, settings, workplace, prepare_model)
        yield run


def _preparation(settings: Mapping[str, Any], workplace: Workplace) -> PrepareModel:
    """Return what is done to the model of a training before its first step."""
    steps: list[PrepareModel] = []
    if "start" in settings:
        with trained_run(settings["start"], workplace) as start:
            checkpoint = latest_checkpoint(start)
        assert checkpoint is not None
        steps.append(partial(load_weights, checkpoint))
    if "hidden_keys" in settings:
        steps.append(partial(hide_keys, share=settings["hidden_keys"], seed=settings["train"]["seed"]))

    def prepare_model(model: LongShortForCausalLM) -> None:
        for step in steps:
            step(model)

    return prepare_model


def _train(
    run: Path,
    settings: Mapping[str, Any],
    workplace: Workplace,
    prepare_model: PrepareModel,
) -> None:
    progress = _Share(settings["train"]["steps"], workplace)
    if (run / CONFIG_FILE).is_file():
        outcome = resume(run, progress=progress, prepare_model=prepare_model)
    else:
        model_file = run.with_suffix(".json")
        replace_file(model_file, strict_json(dict(settings["model"])).encode())
        outcome = train(
            TrainConfig(
                preset=str(model_file),
                data=data_folder(workplace),
                out=run,
                threads=1,
                device=workplace.device,
                **_logging(settings["train"]),
            ),
            progress,
            prepare_model,
        )
    if outcome.signal is not None:
        raise InterruptedError(f"stopped by signal {outcome.signal}")


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Let trials that share a training wait for each other."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_suffix(".lock"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def data_folder(workplace: Workplace) -> Path:
    """Return the folder of the corpus, made by `LanguageStudy.prepare`."""
    return workplace.folder / "data"


def _bytes_per_token(workplace: Workplace) -> float:
    """Compute the bytes of the validation text per token of it, end-of-text tokens left out."""
    split = DataFolder.open(data_folder(workplace)).validation
    return float(split.document_bytes.sum() / (len(split) - split.documents))


def summarize(run: Path, settings: Mapping[str, Any], bytes_per_token: float) -> dict[str, Any]:
    """Reduce a run's metrics.jsonl to numbers: JSON, None for what was not finite.

    Losses are in nats per byte, so that they mean the same with every tokenizer; those of random tokens, in
    `copying_curve`, are per token. `loss` is the mean training
    loss of the last tenth of the steps, largest logits and row ranges are those of the last tenth of the
    measurements. Curves are lists of [step, value]. Runs with a probe also have `probe`, by `probe_series`,
    and `copying_curve`; `constant_until`, the last step before the learning rate falls; and `constant_loss`,
    the validation loss there. Runs with `alarms` also have `alarm_scores`, by `alarm_series`, and
    `diverged_from`, the step at which their loss began to show their divergence.

    Args:
        run: the folder of a finished training.
        settings: its settings.
        bytes_per_token: bytes of text that a token stands for.
    """
    metrics = read_metrics(run)
    losses = [_per_byte(line["loss"], bytes_per_token) for line in metrics]
    monitored = [with_band(line) for line in metrics if "max_logit_by_head" in line]
    late = last_tenth(monitored)
    names = [name for name in _LOGITS if any(line.get(name) is not None for line in monitored)]
    tail = last_tenth(losses)
    training = settings["train"]
    config = model_config(settings["model"], training)
    flops = training_flops(config, training["sequence_length"]).total * training["batch_size"]
    validated = [
        [line["step"], _per_byte(line["validation_loss"], bytes_per_token)]
        for line in metrics
        if "validation_loss" in line
    ]
    return {
        "parameters": parameter_count(config),
        "flops_per_step": flops,
        "tokens_per_step": training["sequence_length"] * training["batch_size"],
        "loss": None if None in tail else fmean(tail),
        "validation_loss": validated[-1][1],
        "diverged_at": divergence_step(losses, _DIVERGED),
        "spikes": _count_spikes(metrics),
        **{name: largest(line[name] for line in late) for name in names},
        "max_logit_by_head": [
            [line["step"], line["max_logit_by_head"]] for line in _thinned(monitored, _HEAD_POINTS)
        ],
        "validation_curve": validated,
        "loss_curve": _mean_curve(losses),
        "logit_curves": {
            name: [[line["step"], line[name]] for line in _thinned(monitored, _CURVE_POINTS)]
            for name in names
        },
        **(_progress(metrics, validated, training) if training.get("probe") else {}),
        **(_alarms(monitored, divergence_onset(losses, _DIVERGED)) if training.get("alarms") else {}),
        "timing": {"tokens_per_second": median(line["tokens_per_second"] for line in metrics)},
    }


def _per_byte(loss: float | None, bytes_per_token: float) -> float | None:
    return None if loss is None else loss / bytes_per_token


def _alarms(monitored: Sequence[Mapping[str, Any]], onset: int | None) -> dict[str, Any]:
    scores = alarm_series(monitored)
    rounded = {name: list(map(_rounded, values)) for name, values in scores.items() if name != "step"}
    return {"diverged_from": onset, "alarm_scores": {"step": scores["step"], **rounded}}


def _progress(
    metrics: Sequence[Mapping[str, Any]], validated: Sequence[Sequence[Any]], training: Mapping[str, Any]
) -> dict[str, Any]:
    """Reduce what a run with a probe measured."""
    lines = [line for line in metrics if "probe" in line]
    constant_until = training["steps"] - training.get("decay_steps", 0)
    return {
        "constant_until": constant_until,
        "constant_loss": [value for step, value in validated if step <= constant_until][-1],
        "probe": {
            "step": [line["step"] for line in lines],
            **probe_series([line["probe"] for line in lines]),
        },
        "copying_curve": [[line["step"], _rounded(line["copying_loss"])] for line in lines],
    }


def probe_series(readings: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Reduce the readings of a probe over heads.

    For each of `max_logit`, `quantile` and `row_range`: the largest of all heads, `…_median` of all, the
    largest over the pairs in the band alone, `…_in_band`, and each head's, `…_layer_0_head_0` and so on.
    """
    series: dict[str, list[float | None]] = {}
    for name in ("max_logit", "quantile", "row_range"):
        for reading in readings:
            layers = reading[name]
            heads = [value for layer in layers for value in layer]
            found = {name: largest(heads), f"{name}_median": None if None in heads else median(heads)}
            if reading[f"{name}_in_band"] is not None:
                found[f"{name}_in_band"] = largest(v for layer in reading[f"{name}_in_band"] for v in layer)
            for index, layer in enumerate(layers):
                found |= {f"{name}_layer_{index}_head_{head}": value for head, value in enumerate(layer)}
            for key, value in found.items():
                series.setdefault(key, []).append(_rounded(value))
    return series


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _logging(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a trial's training, and those that determine what it logs."""
    steps = training["steps"]
    every = max(3, steps // 50)  # or trials of a few steps would spend their time on measurements
    return {
        "log_every": 1,
        "monitor_every": every,
        "monitor_row_range": not training.get("probe"),
        "evaluate_every": every,
        "checkpoint_every": steps,
        "tensorboard": False,
        **training,
    }


class _Share(Progress):
    def __init__(self, steps: int, workplace: Workplace) -> None:
        self._steps = steps
        self._report = workplace.report_progress

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        if step % 20 == 0:
            self._report(step / self._steps)


def needle_cells(run: Path, needle: Mapping[str, Any], workplace: Workplace) -> list[dict[str, Any]]:
    """Measure retrieval by the last weights of a run: gain and accuracy by length and depth.

    Args:
        run: the folder of the training.
        needle: the lengths, depths and samples of `measure_needle`.
        workplace: the environment of trials.
    """
    trained = open_trained(run)
    data = DataFolder.open(data_folder(workplace))
    found = measure_needle(trained.model, trained.tokenizer, data.validation, seed=0, **needle)
    return [
        {"length": cell.length, "depth": cell.depth, "gain": cell.gain, "accuracy": cell.accuracy}
        for cell in found.cells
    ]


def _count_spikes(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Count the spikes that `SpikeDetector` finds in the numbers that a run logged."""
    detector = SpikeDetector()
    spikes = 0
    for line in metrics:
        loss, norm = (math.nan if line[name] is None else line[name] for name in ("loss", "grad_norm"))
        is_monitored = "max_logit_by_head" in line
        logit = (math.nan if line["max_logit"] is None else line["max_logit"]) if is_monitored else None
        spikes += detector.observe(line["step"], loss, norm, logit) is not None
    return spikes


def _mean_curve(losses: Sequence[float | None]) -> list[list[Any]]:
    """Compute the mean loss between two points of the curve; None if a loss was not finite."""
    size = max(1, len(losses) // _CURVE_POINTS)
    curve = []
    for end in range(size, len(losses) + 1, size):
        part = losses[end - size : end]
        curve.append([end, None if None in part else fmean(value for value in part if value is not None)])
    return curve


def last_tenth(lines: Sequence[Any]) -> Sequence[Any]:
    """Return the last tenth of the lines, at least one."""
    return lines[-max(1, len(lines) // 10) :]


def with_band(line: Mapping[str, Any]) -> dict[str, Any]:
    """Add the largest logit of all heads over the pairs inside the band: equal sets of pairs."""
    parts = [line.get(name) for name in ("max_logit_local", "max_logit_global_in_band")]
    known = [part for part in parts if part is not None]
    return {**line, "max_logit_in_band": max(known) if known and line["max_logit"] is not None else None}


def _thinned(lines: Sequence[Any], points: int) -> Sequence[Any]:
    every = max(1, len(lines) // points)
    return [line for index, line in enumerate(lines) if index % every == 0 or index == len(lines) - 1]


def largest(values: Iterable[float | None]) -> float | None:
    """Return the largest value; None if one was not finite, or there is none."""
    known = list(values)
    return None if not known or None in known else max(value for value in known if value is not None)

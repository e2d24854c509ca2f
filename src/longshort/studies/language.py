"""Trials that train a language model, and how studies compare them.

Fair comparison: arms of one seed start from the same weights and see the same batches, equal parameters and
steps, a constant rate after the warm-up. Every arm has a sweep of learning rates of its own, run in full on
seed 0; the main trials are run at its best rate and at the next lower one, where every verdict must hold too,
since rates that explode later look good in short runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from longshort.data import DataFolder, prepare
from longshort.evaluation import measure_needle
from longshort.model import LongShortConfig, preset, training_flops
from longshort.stability import divergence_step
from longshort.studies.study import Results, Study, Trial, Workplace
from longshort.training.config import TrainConfig
from longshort.training.files import replace_file, strict_json
from longshort.training.loop import Progress, resume, train
from longshort.training.metrics import read_metrics
from longshort.training.run import CONFIG_FILE
from longshort.training.trained import open_trained

_EXTENSIONS = 2  # rates that a sweep may add at an edge
_CURVE_POINTS = 60
_FLOPS_PER_SECOND = 1.2e10  # of a laptop's core, overhead included: for the time that is left
_LOGITS = (
    "max_logit",
    "max_logit_local",
    "max_logit_global",
    "max_logit_global_in_band",
    "row_range",
    "row_range_global_in_band",
)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: for tables and legends.
        model: fields of `LongShortConfig` that it has of its own.
        train: fields of `TrainConfig` that it has of its own.
        rates: learning rates of its sweep, rising, from … 1e-3, 3e-3, 1e-2 ….
        measure: what else is measured when it is trained; see `train_language_model`.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    measure: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share.

    Attributes:
        model: fields of `LongShortConfig` over the preset that its key "preset" names.
        train: fields of `TrainConfig`.
        description: for the report.
        rates: learning rates of the sweeps, rising, from … 1e-3, 3e-3, 1e-2 …
    """

    model: Mapping[str, Any]
    train: Mapping[str, Any]
    description: str
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)


def language_trial(setting: Setting, arm: Arm, rate: float, seed: int) -> Trial:
    """The trial of an arm at a learning rate."""
    model = {**setting.model, **arm.model}
    training = {"schedule": "constant", **setting.train, **arm.train, "learning_rate": rate, "seed": seed}
    config = model_config(model, training)
    tokens = training["steps"] * training["batch_size"]
    work = training_flops(config, training["sequence_length"]).total * tokens / _FLOPS_PER_SECOND
    settings: dict[str, Any] = {"model": model, "train": training}
    if arm.measure:
        settings["measure"] = dict(arm.measure)
    return Trial(arm.name, seed, settings, work)


def model_config(model: Mapping[str, Any], training: Mapping[str, Any]) -> LongShortConfig:
    """The config of a trial's model."""
    fields = {key: value for key, value in model.items() if key != "preset"}
    length = training["sequence_length"]
    return preset(model["preset"], mhsa=training.get("mhsa", False), **fields, max_position_embeddings=length)


@dataclass(frozen=True)
class Sweep:
    """The learning rates of an arm.

    Attributes:
        losses: validation loss at the end by rate, first seed; None where it was not finite, or is not
            known yet.
        is_done: whether all are known and the best is not at an edge that could still be moved.
        trials: all of them.
    """

    losses: Mapping[float, float | None]
    is_done: bool
    trials: Sequence[Trial]

    @property
    def best(self) -> float:
        """The rate of the lowest loss; the lowest rate if all runs were lost."""
        return min(self.losses, key=lambda rate: (_or_infinity(self.losses[rate]), rate))

    @property
    def lower(self) -> float:
        """The next lower rate of the sweep; the best itself at the edge."""
        rates = sorted(self.losses)
        return rates[max(0, rates.index(self.best) - 1)]

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return self.best in (min(self.losses), max(self.losses))

    @property
    def good_decades(self) -> float:
        """Width of the range of rates within 0.1 nats of the best, in decades, between tried rates (Wortsman
        et al. 2023 call its inverse learning-rate sensitivity)."""
        least = _or_infinity(self.losses[self.best])
        good = [rate for rate, loss in self.losses.items() if _or_infinity(loss) <= least + 0.1]
        return math.log10(max(good) / min(good)) if good else 0.0


def sweep(setting: Setting, arm: Arm, results: Results, seed: int) -> Sweep:
    """The sweep of an arm as far as it is known; its grid is extended while the best rate is at an edge."""
    rates = sorted(setting.rates)
    for _ in range(_EXTENSIONS + 1):
        trials = [language_trial(setting, arm, rate, seed) for rate in rates]
        known = [results.get(trial.key) for trial in trials]
        losses = {
            rate: None if result is None else result["validation_loss"]
            for rate, result in zip(rates, known, strict=True)
        }
        found = Sweep(losses, all(result is not None for result in known), trials)
        if not found.is_done or not found.is_at_edge or len(rates) == 1:
            return found
        if found.best == rates[-1]:
            rates = [*rates, _neighbour(rates[-1], 1)]
        else:
            rates = [_neighbour(rates[0], -1), *rates]
    return found  # pyright: ignore[reportPossiblyUnboundVariable]


def main_trials(
    setting: Setting, arm: Arm, found: Sweep, seeds: Sequence[int], *, at_lower: bool = True
) -> list[Trial]:
    """An arm's trials at its best rate and at the next lower one, on all seeds."""
    rates = dict.fromkeys([found.best, found.lower] if at_lower else [found.best])
    return [language_trial(setting, arm, rate, seed) for rate in rates for seed in seeds]


class LanguageStudy(Study):
    """A study whose trials train language models."""

    def prepare(self, workplace: Workplace) -> None:
        if not data_folder(workplace).is_dir():
            prepare(workplace.source, data_folder(workplace), tokenizer=workplace.tokenizer)

    def run(self, trial: Trial, workplace: Workplace) -> dict[str, Any]:
        return train_language_model(trial, workplace)


def train_language_model(trial: Trial, workplace: Workplace) -> dict[str, Any]:
    """Train the model of a trial, or go on with it, and sum it up.

    The run's folder is WORKPLACE/runs/NAME; trials with the same training share it. `settings["measure"]` may
    hold "needle": the lengths, depths and samples of `measure_needle`.

    Raises:
        InterruptedError: the training was stopped by a signal; its checkpoint is written.
    """
    settings = trial.settings
    training = Trial(trial.arm, trial.seed, {"model": settings["model"], "train": settings["train"]})
    folder = workplace.folder / "runs"
    run = folder / training.key
    progress = _Share(settings["train"]["steps"], workplace)
    if (run / CONFIG_FILE).is_file():
        outcome = resume(run, progress=progress)
    else:
        model_file = folder / f"{training.key}.json"
        replace_file(model_file, strict_json(dict(settings["model"])).encode())
        outcome = train(
            TrainConfig(
                preset=str(model_file),
                data=data_folder(workplace),
                out=run,
                threads=workplace.threads,
                device=workplace.device,
                **_logging(settings["train"]),
            ),
            progress,
        )
    if outcome.signal is not None:
        raise InterruptedError(f"stopped by signal {outcome.signal}")
    result = summarize(run, settings)
    needle = settings.get("measure", {}).get("needle")
    if needle is not None:
        result["needle"] = _needle(run, needle, workplace)
    return result


def data_folder(workplace: Workplace) -> Path:
    """The tokens of the corpus, made by `LanguageStudy.prepare`."""
    return workplace.folder / "data"


def summarize(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run as numbers, from its metrics.jsonl: JSON, None for what was not finite.

    `loss` is the mean training loss of the last tenth of the steps, largest logits and row ranges are those
    of the last tenth of the measurements. Curves are lists of [step, value].
    """
    metrics = read_metrics(run)
    losses = [line["loss"] for line in metrics]
    monitored = [line for line in metrics if "max_logit_by_head" in line]
    late = monitored[-max(1, len(monitored) // 10) :]
    names = [name for name in _LOGITS if any(line.get(name) is not None for line in monitored)]
    tail = losses[-max(1, len(losses) // 10) :]
    training = settings["train"]
    config = model_config(settings["model"], training)
    flops = training_flops(config, training["sequence_length"]).total * training["batch_size"]
    validated = [[line["step"], line["validation_loss"]] for line in metrics if "validation_loss" in line]
    return {
        "flops_per_step": flops,
        "tokens_per_step": training["sequence_length"] * training["batch_size"],
        "loss": None if None in tail else fmean(tail),
        "validation_loss": validated[-1][1],
        "diverged_at": divergence_step(losses),
        **{name: _largest(line[name] for line in late) for name in names},
        "max_logit_by_head": monitored[-1]["max_logit_by_head"],
        "validation_curve": validated,
        "loss_curve": _running_mean(losses),
        "logit_curves": {
            name: [[line["step"], line[name]] for line in _thinned(monitored)] for name in names
        },
        "timing": {"tokens_per_second": median(line["tokens_per_second"] for line in metrics)},
    }


def loss_at_flops(result: Mapping[str, Any], flops: float) -> float | None:
    """Validation loss when a run had spent so many FLOPs, between two measurements in proportion."""
    step = flops / result["flops_per_step"]
    curve = result["validation_curve"]
    before = curve[0]
    for after in curve:
        if after[0] >= step * (1 - 1e-9):
            if after[1] is None or before[1] is None:
                return None
            if after is before:
                return after[1]
            share = (step - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1])
        before = after
    return curve[-1][1]


def cost_to_reach(result: Mapping[str, Any], loss: float, unit: str) -> float | None:
    """What a run had spent when its validation loss first was as low: tokens or FLOPs; None if it never was.

    Args:
        unit: "tokens" or "flops".
    """
    per_step = result[f"{unit}_per_step"]
    before: list[Any] | None = None
    for step, value in result["validation_curve"]:
        if value is not None and value <= loss:
            if before is None or before[1] is None:
                return step * per_step
            share = (before[1] - loss) / (before[1] - value)
            return (before[0] + share * (step - before[0])) * per_step
        before = [step, value]
    return None


def _logging(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trial with those that decide what is written down."""
    steps = training["steps"]
    every = max(1, steps // 50)
    return {
        "log_every": 1,
        "monitor_every": every,
        "monitor_row_range": True,
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


def _needle(run: Path, needle: Mapping[str, Any], workplace: Workplace) -> list[dict[str, Any]]:
    trained = open_trained(run)
    data = DataFolder.open(data_folder(workplace))
    found = measure_needle(trained.model, trained.tokenizer, data.validation, seed=0, **needle)
    return [
        {"length": cell.length, "depth": cell.depth, "gain": cell.gain, "accuracy": cell.accuracy}
        for cell in found.cells
    ]


def _running_mean(losses: Sequence[float | None]) -> list[list[Any]]:
    """Means over the steps between two points of the curve; None where one was not finite."""
    size = max(1, len(losses) // _CURVE_POINTS)
    curve = []
    for end in range(size, len(losses) + 1, size):
        part = losses[end - size : end]
        curve.append([end, None if None in part else fmean(value for value in part if value is not None)])
    return curve


def _thinned(lines: Sequence[Any]) -> Sequence[Any]:
    every = max(1, len(lines) // _CURVE_POINTS)
    return [line for index, line in enumerate(lines) if index % every == 0 or index == len(lines) - 1]


def _largest(values: Any) -> float | None:
    known = list(values)
    return None if None in known else max(known)


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _neighbour(rate: float, direction: int) -> float:
    """The next of … 1e-3, 3e-3, 1e-2 … upwards (1) or downwards (-1)."""
    index = round(2 * math.log10(rate)) + direction
    return float(f"{3 if index % 2 else 1}e{index // 2}")

"""Trials that train a language model: arms, settings, and sweeps of learning rates.

Fair comparison: arms of one seed start from the same weights and see the same batches, at equal steps and a
constant rate after the warm-up. Every arm has a sweep of learning rates of its own, run in full on the first
seed; the main trials are run at its best rate and at the next lower one, where every verdict must hold too,
since rates that explode later look good in short runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longshort.model import LongShortConfig, preset, training_flops
from longshort.studies.study import Results, Trial

_EXTENSIONS = 2  # rates that a sweep may add at an edge
_FLOPS_PER_SECOND = 4e10  # of a laptop's core, overhead included: for the time that is left


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: for tables and legends.
        model: fields of `LongShortConfig` that it has of its own.
        train: fields of `TrainConfig` that it has of its own.
        measure: what else is measured when it is trained; see language_run.py.
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
        """The next lower rate, below the sweep's lowest if that is the best."""
        lower = [rate for rate in self.losses if rate < self.best]
        return max(lower, default=_neighbour(self.best, -1))

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return self.best in (min(self.losses), max(self.losses))

    @property
    def good_decades(self) -> float:
        """Width of the range of rates within 0.1 nats of the best, in decades, between tried rates (Wortsman
        et al. 2023 call its inverse learning-rate sensitivity)."""
        least = self.losses[self.best]
        if least is None:
            return 0.0
        good = [rate for rate, loss in self.losses.items() if loss is not None and loss <= least + 0.1]
        return math.log10(max(good) / min(good))


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


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _neighbour(rate: float, direction: int) -> float:
    """The next of … 1e-3, 3e-3, 1e-2 … upwards (1) or downwards (-1)."""
    index = round(2 * math.log10(rate)) + direction
    return float(f"{3 if index % 2 else 1}e{index // 2}")

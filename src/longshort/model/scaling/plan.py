"""What a training on many GPUs is expected to take, and the same with every head global."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from longshort.checks import require_integer
from longshort.model.config import LongShortConfig
from longshort.model.scaling.keys import KeyTraffic, imbalance
from longshort.model.scaling.memory import TrainingMemory, training_memory
from longshort.model.scaling.setup import TrainingSetup
from longshort.model.scaling.step_time import Rates, StepFlops, StepTime, step_flops, step_time
from longshort.model.scaling.traffic import StepTraffic, layer_traffic, step_traffic
from longshort.model.scaling.weights import Weights


@dataclass(frozen=True)
class TrainingPlan:
    """The costs of one training step by the models of this package.

    Attributes:
        name: readable name of the layout and of how keys travel.
        setup: the model, the batch and the GPUs.
        parameters: number of the model's parameters.
        memory: bytes on one GPU.
        checkpointed: the same with gradient checkpointing.
        flops: operations of a step over all GPUs.
        imbalance: the most visible pairs of the global heads that a rank computes, over the mean.
        layer: bytes that one GPU sends in the forward pass of one layer for one sequence.
        traffic: bytes that one GPU sends in a step.
        time: seconds of a step.
    """

    name: str
    setup: TrainingSetup
    parameters: int
    memory: TrainingMemory
    checkpointed: TrainingMemory
    flops: StepFlops
    imbalance: float
    layer: KeyTraffic
    traffic: StepTraffic
    time: StepTime


def plan_training(
    name: str, setup: TrainingSetup, rates: Rates, weights: Weights | None = None
) -> TrainingPlan:
    """Count and model what a training step takes.

    Args:
        name: readable name.
        setup: the model, the batch and the GPUs.
        rates: what the GPUs are taken to do.
        weights: `Weights.of(setup.config)`, if it is known already.
    """
    weights = weights or Weights.of(setup.config)
    traffic = step_traffic(setup, weights)
    return TrainingPlan(
        name=name,
        setup=setup,
        parameters=weights.count,
        memory=training_memory(setup, weights),
        checkpointed=training_memory(replace(setup, checkpointing=True), weights),
        flops=step_flops(setup),
        imbalance=imbalance(setup),
        layer=layer_traffic(setup),
        traffic=traffic,
        time=step_time(setup, rates, traffic),
    )


def compare_training(
    setup: TrainingSetup, rates: Rates, weights: Weights | None = None
) -> list[TrainingPlan]:
    """Plan a setup, and the same model with every head global: where sequences are cut once with an
    all-gather of all keys and values, and once with a ring. The arguments are those of `plan_training`."""
    weights = weights or Weights.of(setup.config)  # of equal shapes with every head global
    return [plan_training(name, one, rates, weights) for name, one in _candidates(setup)]


def fewest_context_ranks(batch: int, ranks: int) -> int:
    """Return the fewest ranks that must share a sequence so that every rank has a part of one.

    Raises:
        ValueError: batch or ranks is not an integer >= 1.
    """
    require_integer("batch", batch, minimum=1)
    require_integer("ranks", ranks, minimum=1)
    return ranks // gcd(batch, ranks)


def _candidates(setup: TrainingSetup) -> Iterator[tuple[str, TrainingSetup]]:
    yield "LS-attention", replace(setup, exchange="long-short")
    mhsa = replace(setup, config=_all_global(setup.config))
    if setup.context_parallel == 1:
        yield "MHSA", mhsa
        return
    yield "MHSA, all-gather", replace(mhsa, exchange="all-gather")
    yield "MHSA, ring", replace(mhsa, exchange="ring")


def _all_global(config: LongShortConfig) -> LongShortConfig:
    changed = copy.copy(config)
    changed.layouts = None
    changed.num_global_heads = config.num_attention_heads
    if changed.local_window is None:
        changed.local_window = 1  # of no head
    changed.check()
    return changed

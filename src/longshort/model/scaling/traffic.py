"""A model of what one GPU sends in a training step, in bytes, mean over the ranks.

A collective is counted as a ring carries it out: an all-gather or a reduce-scatter of N bytes over R ranks
sends N·(R - 1)/R from each, an all-reduce twice that. Sums over ranks of a few numbers (the loss, the norm of
the gradient, statistics) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from longshort.model.scaling.keys import KeyTraffic, key_traffic
from longshort.model.scaling.setup import TrainingSetup
from longshort.model.scaling.weights import Weights

_FP32 = 4


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one GPU sends in one step.

    Attributes:
        keys: the keys and values of attention, over all layers and sequences, forward and backward.
        weights: all-gathers of weights in fp32: for each micro-batch those of the blocks, once forward and
            once backward, and of the rest once.
        scattered: the reduce-scatter of their gradients in fp32, once a step.
        reduced: the all-reduce of gradients over the copies of the weights, in fp32, once a step.
    """

    keys: KeyTraffic
    weights: float
    scattered: float
    reduced: float

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.keys.total + self.weights + self.scattered + self.reduced


def layer_traffic(setup: TrainingSetup) -> KeyTraffic:
    """Count what one GPU sends in the forward pass of one layer for one sequence, mean over layers."""
    layouts = setup.config.head_layouts()
    total = KeyTraffic()
    for layout in layouts:
        total = total.plus(key_traffic(setup, layout))
    return total.times(1 / len(layouts))


def step_traffic(setup: TrainingSetup, weights: Weights | None = None) -> StepTraffic:
    """Count what one GPU sends in a step.

    Args:
        setup: the model, the batch and the GPUs.
        weights: `Weights.of(setup.config)`, if it is known already.
    """
    weights = weights or Weights.of(setup.config)
    keys = KeyTraffic()
    for layout in setup.config.head_layouts():
        for backward in (False, True):
            keys = keys.plus(key_traffic(setup, layout, backward=backward))
    shards, copies = setup.shard_count, setup.ranks // setup.shard_count
    whole, root = weights.gathered(shards), weights.root_gathered(shards)
    sent_of_whole = _FP32 * (shards - 1) / shards
    return StepTraffic(
        keys=keys.times(setup.sequences),
        weights=sent_of_whole * setup.micro_batches * (2 * (whole - root) + root),
        scattered=sent_of_whole * whole,
        reduced=2 * _FP32 * weights.in_shard(shards) * (copies - 1) / copies,
    )

"""A model of the memory of a training step on one GPU, in bytes.

Weights, gradients and AdamW's state follow from shapes, activations from the model's code; tests compare both
with what torch allocates. Not counted: the buffers of kernels, fragmentation, CUDA's context.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from longshort.model.scaling.activations import (
    block_backward_bytes,
    block_bytes,
    boundary_bytes,
    cut_bytes,
    head_bytes,
    loss_bytes,
)
from longshort.model.scaling.setup import TrainingSetup
from longshort.model.scaling.weights import Weights

_FP32 = 4


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU, each where it is largest: they are not all needed at one moment.

    Attributes:
        parameters: the rank's weights, fp32.
        gradients: their gradients, fp32; under DDP its buckets are views of them.
        optimizer: AdamW's two moments, fp32, and for each parameter a counter of steps.
        whole_weights: under FSDP the gathered weights outside the blocks and of three blocks (one in use, one
            on its way, one in the buffer of its all-gather), fp32; and the gradients of the head, and of one
            block twice, until they are scattered; with several micro-batches the sum of all gradients, which
            FSDP2 scatters once. In bf16 also the copies of all matrices that autocast makes.
        activations: what is kept of the blocks for their backward pass; with checkpointing their inputs.
        exchanged: what is kept besides because sequences are cut; with checkpointing what arrived.
        working: the most that the loss, or the backward pass of one block, needs besides; with checkpointing
            the block is recomputed.
    """

    parameters: int
    gradients: int
    optimizer: int
    whole_weights: int
    activations: int
    exchanged: int
    working: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(setup: TrainingSetup, weights: Weights | None = None) -> TrainingMemory:
    """Estimate the memory of a training step on one GPU, rather too high than too low.

    Args:
        setup: the model, the batch and the GPUs.
        weights: `Weights.of(setup.config)`, if it is known already.
    """
    weights = weights or Weights.of(setup.config)
    numbers = weights.in_shard(setup.shard_count)
    layouts = setup.config.head_layouts()
    backward = [block_backward_bytes(setup, layout) for layout in layouts]
    exchanged = [cut_bytes(setup, layout, arrived_only=setup.checkpointing) for layout in layouts]
    if setup.checkpointing:  # what one block keeps is there while its backward pass runs
        again = block_bytes(setup) - boundary_bytes(setup)
        backward = [
            needed + again + cut_bytes(setup, layout, arrived_only=False) - arrived
            for needed, layout, arrived in zip(backward, layouts, exchanged, strict=True)
        ]
    return TrainingMemory(
        parameters=_FP32 * numbers,
        gradients=_FP32 * numbers,
        optimizer=2 * _FP32 * numbers + _FP32 * len(weights.shapes),
        whole_weights=_whole_weights(setup, weights),
        activations=len(layouts) * (boundary_bytes if setup.checkpointing else block_bytes)(setup),
        exchanged=sum(exchanged),
        working=max(head_bytes(setup) + loss_bytes(setup), *backward),
    )


def _whole_weights(setup: TrainingSetup, weights: Weights) -> int:
    config, shards, block = setup.config, setup.shard_count, weights.largest_block
    head = config.vocab_size * config.hidden_size
    copies = 0
    if setup.precision == "bf16":
        copies = setup.element_size * (config.num_hidden_layers * block + head)
    if setup.parallel == "ddp":
        return copies
    gathered = weights.root_gathered(shards) + 3 * block
    gradients = weights.count if setup.micro_batches > 1 else 2 * block + head
    return copies + _FP32 * (gathered + gradients)

"""The weights of a model, grouped as FSDP2 shards them: the blocks, one group each, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

import torch

from longshort.model.config import LongShortConfig
from longshort.model.modeling import LongShortForCausalLM


@dataclass(frozen=True)
class Weights:
    """The shapes of a model's parameters, a tied matrix once.

    Attributes:
        blocks: the shapes of each block.
        root: the shapes of all else: embeddings, positions, last norm, head.
    """

    blocks: tuple[tuple[tuple[int, ...], ...], ...]
    root: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, config: LongShortConfig) -> Weights:
        """Read the shapes off a model without memory."""
        with torch.device("meta"):
            model = LongShortForCausalLM(config)
        blocks = [[tuple(p.shape) for p in block.parameters()] for block in model.model.layers]
        inside = {id(p) for block in model.model.layers for p in block.parameters()}
        root = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in inside)
        return cls(tuple(map(tuple, blocks)), root)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all parameters."""
        return (*(shape for block in self.blocks for shape in block), *self.root)

    @cached_property
    def count(self) -> int:
        """Number of all parameters."""
        return self.in_shard(1)

    @cached_property
    def root_count(self) -> int:
        """Number of the parameters outside the blocks."""
        return _in_shard(self.root, 1)

    @cached_property
    def largest_block(self) -> int:
        """Number of the parameters of the largest block."""
        return max(_in_shard(block, 1) for block in self.blocks)

    def in_shard(self, shards: int) -> int:
        """Count the numbers that each of `shards` ranks stores: FSDP2 cuts every parameter along its first
        dimension into chunks of ceil(rows / shards) rows, and pads the chunks that are shorter or empty."""
        return _in_shard(self.shapes, shards)

    def gathered(self, shards: int) -> int:
        """Count the numbers of all parameters after an all-gather from `shards` ranks, padding included."""
        return shards * self.in_shard(shards)

    def root_gathered(self, shards: int) -> int:
        """Count those of the parameters outside the blocks."""
        return shards * _in_shard(self.root, shards)


def _in_shard(shapes: tuple[tuple[int, ...], ...], shards: int) -> int:
    return sum(ceil(shape[0] / shards) * prod(shape[1:]) for shape in shapes)

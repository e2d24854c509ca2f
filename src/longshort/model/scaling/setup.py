"""What a training on many GPUs is made of, as far as its costs depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from longshort.checks import require_integer
from longshort.model.config import LongShortConfig

Parallel = Literal["fsdp", "ddp"]
"""How weights lie on the GPUs: in shards (FSDP2), or whole on each (DDP)."""

Precision = Literal["bf16", "fp32"]
"""The dtype of products; weights, gradients and the optimizer's state are in fp32 in both."""

Exchange = Literal["long-short", "all-gather", "ring"]
"""How context parallelism brings keys to queries: ours, by head; or those of all heads, gathered or passed
on from rank to rank."""

_ATTENTION_SIZES = {"fp64": 8, "fp32": 4, "bf16": 2, "bf16-flash": 2, "sdpa-bf16": 2}
"""Bytes of a number of queries, keys and values; "input" takes the products' dtype."""


@dataclass(frozen=True)
class TrainingSetup:
    """One model, one batch, and the GPUs that share them.

    The GPUs form a mesh of `data_ranks` × `context_parallel`: the ranks of a row hold parts of the same
    sequences. Under FSDP the weights are cut over all ranks, or over `shards` of them (HSDP).

    Attributes:
        config: the model.
        length: tokens of a sequence, one document; with learned positions at most max_position_embeddings.
        batch: sequences per optimizer step, over all ranks; a multiple of ranks / context_parallel.
        ranks: GPUs, >= 1.
        context_parallel: ranks that share a sequence, a divisor of ranks.
        micro_batch: sequences per forward pass of the ranks that share them; None: all of their step.
        parallel: fsdp or ddp.
        shards: under fsdp the ranks that hold one copy of the weights, a divisor of ranks; None: all.
        precision: bf16 or fp32.
        checkpointing: recompute each block in the backward pass.
        exchange: how keys get to queries where context_parallel > 1.

    Raises:
        ValueError: an attribute is out of its range, or two do not fit; the message begins with its name.
        TypeError: config is no LongShortConfig.
    """

    config: LongShortConfig
    length: int
    batch: int
    ranks: int
    context_parallel: int = 1
    micro_batch: int | None = None
    parallel: Parallel = "fsdp"
    shards: int | None = None
    precision: Precision = "bf16"
    checkpointing: bool = False
    exchange: Exchange = "long-short"

    def __post_init__(self) -> None:
        if not isinstance(self.config, LongShortConfig):
            raise TypeError(f"config must be a LongShortConfig, got {type(self.config).__name__}")
        for name in ("length", "batch", "ranks", "context_parallel"):
            require_integer(name, getattr(self, name), minimum=1)
        for name in ("micro_batch", "shards"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), minimum=1)
        for name, kinds in (("parallel", Parallel), ("precision", Precision), ("exchange", Exchange)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}"
                )
        self._check_sizes()
        self._check_model()

    def _check_sizes(self) -> None:
        if self.ranks % self.context_parallel:
            raise ValueError(
                f"context_parallel must divide the {self.ranks} ranks, got {self.context_parallel}"
            )
        if self.batch % self.data_ranks:
            raise ValueError(
                f"batch must be a multiple of {self.data_ranks} = ranks / context_parallel, "
                f"of which each row takes as many sequences, got {self.batch}"
            )
        if self.shards is not None and self.parallel != "fsdp":
            raise ValueError(f"shards goes only with parallel fsdp, got {self.shards} with {self.parallel}")
        if self.shards is not None and self.ranks % self.shards:
            raise ValueError(f"shards must divide the {self.ranks} ranks, got {self.shards}")

    def _check_model(self) -> None:
        kinds = {kind for layer in self.config.head_position_embeddings() for kind in layer}
        longest = self.config.max_position_embeddings
        if "learned" in kinds and self.length > longest:
            raise ValueError(
                f"length must be at most max_position_embeddings = {longest} with learned positions, "
                f"got {self.length}"
            )
        if self.context_parallel == 1:
            return
        if self.config.short_convolution is not None:
            raise ValueError(
                f"context_parallel must be 1 with short_convolution, got {self.context_parallel}"
            )
        if self.exchange == "long-short" and "alibi" in kinds and self.config.sink_tokens:
            raise ValueError(
                f"context_parallel must be 1 with ALiBi and sink tokens, got {self.context_parallel}"
            )

    @property
    def data_ranks(self) -> int:
        """Rows of the mesh: the ranks, or groups of ranks, that take different sequences."""
        return self.ranks // self.context_parallel

    @property
    def sequences(self) -> int:
        """Sequences of a step that the ranks of one row share."""
        return self.batch // self.data_ranks

    @property
    def sequences_at_once(self) -> int:
        """Sequences of one forward pass of a row."""
        return min(self.micro_batch or self.sequences, self.sequences)

    @property
    def micro_batches(self) -> int:
        """Forward passes per step."""
        return ceil(self.sequences / self.sequences_at_once)

    @property
    def part(self) -> int:
        """Tokens of a sequence that one rank holds; a length that is not divisible is padded."""
        return ceil(self.length / self.context_parallel)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of one forward pass of one rank."""
        return self.sequences_at_once * self.part

    @property
    def shard_count(self) -> int:
        """Ranks that hold one copy of the weights together."""
        return 1 if self.parallel == "ddp" else self.shards or self.ranks

    @property
    def element_size(self) -> int:
        """Bytes of a number in the products' dtype."""
        return _element_size(self.precision)

    @property
    def attention_size(self) -> int:
        """Bytes of a number of queries, keys and values."""
        return attention_size(self.config, self.precision)


def attention_size(config: LongShortConfig, precision: str) -> int:
    """Count the bytes of a number of queries, keys and values, if products are computed in a precision."""
    return _ATTENTION_SIZES.get(config.attention_precision, _element_size(precision))


def _element_size(precision: str) -> int:
    return 2 if precision == "bf16" else 4

"""`longshort plan --ranks`: what training on many GPUs would take, by formulas and assumed rates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from longshort.checks import check_fields, flag
from longshort.cli.errors import UsageError
from longshort.cli.flags import parse
from longshort.cli.rates import RateFlags
from longshort.cli.tables import plain_table
from longshort.cli.units import format_bytes, format_count, format_seconds, parse_bytes
from longshort.model import preset
from longshort.model.scaling import (
    TrainingPlan,
    TrainingSetup,
    Weights,
    compare_training,
    fewest_context_ranks,
)
from longshort.reporting.console import console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longshort.model import LongShortConfig

_DESCRIPTION = """Model what a training step on many GPUs takes: memory, operations, bytes sent and time, for
LS-attention and for MHSA. Where sequences are cut across GPUs, MHSA gathers all keys and values, or passes
them round a ring.

Nothing is run and nothing here was measured. Memory, operations and bytes are counted; the time follows from
rates that the flags assume, and is printed with them. `longshort plan --help` explains the plan of inference.
"""
_MEMORY_ROWS = {
    "parameters": "parameters, fp32",
    "gradients": "gradients, fp32",
    "optimizer": "AdamW, fp32",
    "whole_weights": "whole weights, copies",
    "activations": "activations",
    "exchanged": "kept since cut",
    "working": "loss or one block",
}
_FLOPS_ROWS = {
    "matrices": "matrices",
    "global_attention": "global heads",
    "local_attention": "local heads",
    "lm_head": "logits",
    "total": "total",
}
_KEY_ROWS = {
    "halo": "halo of local heads",
    "sinks": "sink tokens",
    "gather": "gathered keys",
    "lent": "lent queries",
    "ring": "keys in a ring",
}
_TIME_ROWS = {
    "matrices": "matrices",
    "global_attention": "global heads",
    "local_attention": "local heads",
    "exposed_keys": "waiting for keys",
    "exposed_weights": "waiting for weights",
    "total": "step",
}

_SHORT_NAMES = {"LS-attention": "LS", "MHSA, all-gather": "MHSA, gather"}


@dataclass(frozen=True, kw_only=True)
class TrainingPlanFlags(RateFlags):
    ranks: tuple[Annotated[int, Ge(1)], ...]
    """GPUs, or several numbers of GPUs: then one line for each."""

    length: Annotated[int, Ge(1)]
    """Tokens of a sequence, one document."""

    batch: Annotated[int, Ge(1)]
    """Sequences per optimizer step, over all GPUs."""

    preset: str = "paper-base"
    """The model: a preset's name or a JSON file, as for `longshort train`. The flags below override it."""

    layers: Annotated[int, Ge(1)] | None = None
    """Blocks."""

    heads: Annotated[int, Ge(1)] | None = None
    """Query heads per block."""

    head_dim: Annotated[int, Ge(1)] | None = None
    """Width of a head."""

    kv_heads: Annotated[int, Ge(1)] | None = None
    """Key/value heads per block."""

    hidden_size: Annotated[int, Ge(1)] | None = None
    """Width of the hidden states."""

    vocab_size: Annotated[int, Ge(1)] | None = None
    """Number of tokens in the vocabulary."""

    global_heads: Annotated[int, Ge(0)] | None = None
    """Global heads per block."""

    window: Annotated[int, Ge(1)] | None = None
    """Tokens that a local head sees, the query's own included."""

    sink_tokens: Annotated[int, Ge(0)] | None = None
    """First tokens that local heads always see."""

    position_embedding: Literal["learned", "rope", "alibi", "none"] | None = None
    """Kind of positions."""

    context_parallel: Annotated[int, Ge(1)] | None = None
    """GPUs that share each sequence. None: as few as give every GPU a part of one."""

    micro_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per forward pass of the GPUs that share them. None: all at once."""

    parallel: Literal["fsdp", "ddp"] = "fsdp"
    """fsdp: weights, gradients and optimizer are cut into shards. ddp: each GPU has a copy."""

    shards: Annotated[int, Ge(1)] | None = None
    """With --parallel fsdp, GPUs among which the model is cut; groups of so many hold copies. None: all."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast, weights and optimizer stay in fp32."""

    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass. Its memory is always printed, its time only with this."""

    memory: str = "80GiB"
    """Memory of a GPU: what does not fit is marked."""

    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.ranks:
            raise ValueError("--ranks must name at least one number, got none")
        parse_bytes("--memory", self.memory)

    def setups(self) -> list[TrainingSetup]:
        """Return the setup of each number of GPUs."""
        config = self._config()
        return [self._setup(config, ranks) for ranks in self.ranks]

    def _setup(self, config: LongShortConfig, ranks: int) -> TrainingSetup:
        context_parallel = self.context_parallel or fewest_context_ranks(self.batch, ranks)
        try:
            return TrainingSetup(
                config,
                self.length,
                self.batch,
                ranks,
                context_parallel=context_parallel,
                micro_batch=self.micro_batch_size,
                parallel=self.parallel,
                shards=self.shards,
                precision=self.precision,
                checkpointing=self.gradient_checkpointing,
            )
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise UsageError(f"{flag(name)} {rest}" if hasattr(self, name) else str(error)) from None

    def _config(self) -> LongShortConfig:
        hidden_size = self.hidden_size
        if hidden_size is None and (self.heads or self.head_dim):
            shape = preset(self.preset)
            hidden_size = (self.heads or shape.num_attention_heads) * (self.head_dim or shape.head_dim)
        changes = {
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "head_dim": self.head_dim,
            "num_key_value_heads": self.kv_heads,
            "hidden_size": hidden_size,
            "vocab_size": self.vocab_size,
            "num_global_heads": self.global_heads,
            "local_window": self.window,
            "sink_tokens": self.sink_tokens,
            "position_embedding": self.position_embedding,
            "max_position_embeddings": self.length,
        }
        return preset(self.preset, **{name: value for name, value in changes.items() if value is not None})


def run(arguments: list[str]) -> int:
    flags = parse(TrainingPlanFlags, "plan", arguments, _DESCRIPTION)
    rates, setups = flags.rates(flags.precision), flags.setups()
    weights = Weights.of(setups[0].config)
    compared = [compare_training(setup, rates, weights) for setup in setups]
    if flags.json:
        content = {
            "rates": asdict(rates),
            "plans": [as_content(plan) for plans in compared for plan in plans],
        }
        print(json.dumps(content, indent=2))
        return 0
    output = console()
    output.print(f"{describe_model(setups[0], weights.count)}\n", markup=False)
    if len(setups) == 1:
        _print_details(output, compared[0], parse_bytes("--memory", flags.memory))
    else:
        _print_scan(output, compared, parse_bytes("--memory", flags.memory))
    output.print(f"\n{flags.describe(flags.precision)}", markup=False)
    return 0


def describe_model(setup: TrainingSetup, parameters: int) -> str:
    """Describe in two lines the model and what is fixed of its training."""
    config = setup.config
    heads = f"{config.num_attention_heads} heads"
    if config.num_key_value_heads < config.num_attention_heads:
        heads += f" on {config.num_key_value_heads} key/value heads"
    kind = f"FSDP over {setup.shards or 'all'}" if setup.parallel == "fsdp" else "DDP"
    return (
        f"{config.num_hidden_layers} layers, {heads} of {config.head_dim}, hidden size {config.hidden_size}: "
        f"{format_count(parameters)} parameters\n"
        f"{setup.batch:,} sequence{'' if setup.batch == 1 else 's'} of {setup.length:,} tokens a step; "
        f"{setup.precision}, {kind}" + (", gradient checkpointing" if setup.checkpointing else "")
    )


def as_content(plan: TrainingPlan) -> dict[str, Any]:
    """Return a plan's numbers for JSON: bytes, operations and seconds."""
    setup = plan.setup
    return {
        "name": plan.name,
        "ranks": setup.ranks,
        "context_parallel": setup.context_parallel,
        "data_ranks": setup.data_ranks,
        "parallel": setup.parallel,
        "shards": setup.shard_count,
        "length": setup.length,
        "batch": setup.batch,
        "micro_batch": setup.sequences_at_once,
        "precision": setup.precision,
        "gradient_checkpointing": setup.checkpointing,
        "exchange": setup.exchange,
        "parameters": plan.parameters,
        "imbalance": plan.imbalance,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "memory_bytes_checkpointed": {**asdict(plan.checkpointed), "total": plan.checkpointed.total},
        "flops": {**asdict(plan.flops), "total": plan.flops.total},
        "layer_bytes_sent": {**asdict(plan.layer), "total": plan.layer.total},
        "step_bytes_sent": {**asdict(plan.traffic), "total": plan.traffic.total},
        "step_seconds": {
            **asdict(plan.time),
            "total": plan.time.total,
            "tokens_per_second": plan.time.tokens_per_second,
        },
    }


def _print_details(output: Any, plans: Sequence[TrainingPlan], limit: int) -> None:
    setup = plans[0].setup
    output.print(
        f"{setup.data_ranks} × {setup.context_parallel} GPUs, those of a row share sequences: "
        f"{setup.micro_batches} × {setup.sequences_at_once} of them a step\n",
        markup=False,
    )
    memory = plain_table("memory of a GPU", *(plan.name for plan in plans))
    for field, name in _MEMORY_ROWS.items():
        memory.add_row(name, *(format_bytes(getattr(plan.memory, field)) for plan in plans))
    memory.add_row("total", *(_size_in(plan.memory.total, limit) for plan in plans))
    memory.add_row("with checkpointing", *(_size_in(plan.checkpointed.total, limit) for plan in plans))
    flops = plain_table("FLOPs of a step", *(plan.name for plan in plans))
    for field, name in _FLOPS_ROWS.items():
        flops.add_row(name, *(format_count(getattr(plan.flops, field)) for plan in plans))
    flops.add_row("most pairs of a GPU / mean", *(f"{plan.imbalance:.3f}" for plan in plans))
    tables = [memory, flops]
    if setup.context_parallel > 1:
        layer = plain_table("sent a layer, forward", *(plan.name for plan in plans))
        _add_rows(layer, _KEY_ROWS, [plan.layer for plan in plans], format_bytes)
        layer.add_row("total", *(format_bytes(round(plan.layer.total)) for plan in plans))
        tables.append(layer)
    sent = plain_table("sent by a GPU, a step", *(plan.name for plan in plans))
    _add_rows(sent, _KEY_ROWS, [plan.traffic.keys for plan in plans], format_bytes)
    rows = {"weights": "gathered weights", "scattered": "scattered gradients", "reduced": "reduced gradients"}
    _add_rows(sent, rows, [plan.traffic for plan in plans], format_bytes)
    sent.add_row("total", *(format_bytes(round(plan.traffic.total)) for plan in plans))
    time = plain_table("time of a step (model)", *(plan.name for plan in plans))
    for field, name in _TIME_ROWS.items():
        time.add_row(name, *(format_seconds(getattr(plan.time, field)) for plan in plans))
    time.add_row("tokens/s, all GPUs", *(format_count(round(plan.time.tokens_per_second)) for plan in plans))
    for index, table in enumerate([*tables, sent, time]):
        if index:
            output.print()
        output.print(table)
    _print_mark(output, plans, limit)


def _add_rows(table: Any, rows: dict[str, str], values: list[Any], form: Callable[[int], str]) -> None:
    """Add the rows of kinds that at least one plan has."""
    for field, name in rows.items():
        numbers = [round(getattr(value, field)) for value in values]
        if any(numbers):
            table.add_row(name, *(form(number) for number in numbers))


def _print_scan(output: Any, compared: Sequence[Sequence[TrainingPlan]], limit: int) -> None:
    table = plain_table("GPUs", "memory", "sent/step", "compute", "waiting", "step", "tokens/s")
    table.add_column("attention")
    table.pad_edge = False
    for plans in compared:
        for plan in plans:
            setup, time = plan.setup, plan.time
            memory = plan.checkpointed if setup.checkpointing else plan.memory
            table.add_row(
                f"{setup.data_ranks} × {setup.context_parallel}",
                _size_in(memory.total, limit),
                format_bytes(round(plan.traffic.total)),
                format_seconds(time.compute),
                format_seconds(time.exposed_keys + time.exposed_weights),
                format_seconds(time.total),
                format_count(round(time.tokens_per_second)),
                _SHORT_NAMES.get(plan.name, plan.name),
            )
    output.print(table)
    _print_mark(output, [plan for plans in compared for plan in plans], limit)


def _size_in(size: int, limit: int) -> str:
    return f"{format_bytes(size)}{' !' if size > limit else ''}"


def _print_mark(output: Any, plans: Sequence[TrainingPlan], limit: int) -> None:
    if any(size > limit for plan in plans for size in (plan.memory.total, plan.checkpointed.total)):
        output.print(f"\n! more than {format_bytes(limit)}", markup=False)

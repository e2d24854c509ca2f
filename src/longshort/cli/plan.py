"""The command `longshort plan`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge

from longshort.checks import check_fields
from longshort.cli import plan_paper_runs, plan_training
from longshort.cli.flags import parse
from longshort.cli.tables import plain_table
from longshort.cli.units import format_bytes, format_count, parse_bytes
from longshort.model import parameter_count, plan_layouts, preset
from longshort.reporting.console import console

if TYPE_CHECKING:
    from longshort.model import Flops, LayoutPlan, LongShortConfig


@dataclass(frozen=True)
class PlanFlags:
    """Count the costs of different layouts of a model's heads at inference: all heads global (MHSA), each
    number of global heads with each window, and for each number a hybrid by layers, as in Gemma 3. Nothing is
    loaded or run.

    Decoding reads the weights and the cache for each token. If memory bandwidth is the limit, the time
    relative to MHSA is at least the bytes relative to MHSA. Positions and activations are not counted.

    With --ranks the command plans training on many GPUs instead, and with --paper-runs it prints the paper's
    trainings; `longshort plan --ranks --help` and `longshort plan --paper-runs --help` explain them.
    """

    length: Annotated[int, Ge(1)]
    """Tokens of the prompt."""

    preset: str = "paper-base"
    """Shape of the model: a preset's name or a JSON file, as for `longshort train`. The flags below override
    it."""

    layers: Annotated[int, Ge(1)] | None = None
    """Blocks."""

    heads: Annotated[int, Ge(1)] | None = None
    """Query heads per block."""

    head_dim: Annotated[int, Ge(1)] | None = None
    """Width of a head."""

    kv_heads: Annotated[int, Ge(1)] | None = None
    """Key/value heads per block."""

    hidden_size: Annotated[int, Ge(1)] | None = None
    """Width of the hidden states. None: the preset's, or heads × head dim if one of them is given."""

    vocab_size: Annotated[int, Ge(1)] | None = None
    """Number of tokens in the vocabulary."""

    sink_tokens: Annotated[int, Ge(0)] | None = None
    """First tokens that local heads always see."""

    global_heads: tuple[Annotated[int, Ge(0)], ...] = ()
    """Number of global heads per block, or several numbers. None given: the smallest, the query heads of one
    key/value head."""

    windows: tuple[Annotated[int, Ge(1)], ...] = ()
    """Tokens that a local head sees, the query's own included, or several numbers. None given: the
    preset's."""

    hybrid_window: Annotated[int, Ge(1)] = 1024
    """Tokens that heads see in the local layers of hybrids; the default is Gemma 3's."""

    batch: Annotated[int, Ge(1)] = 1
    """Sequences at a time."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of weights and cache."""

    memory: str | None = None
    """Memory for weights and cache, such as 4GiB: also print the longest context that fits. None: do not."""

    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.memory is not None:
            parse_bytes("--memory", self.memory)


def run(arguments: list[str]) -> int:
    given = {argument.partition("=")[0] for argument in arguments}
    if "--ranks" in given:
        return plan_training.run(arguments)
    if "--paper-runs" in given:
        return plan_paper_runs.run(arguments)
    flags = parse(PlanFlags, "plan", arguments)
    config = _config(flags)
    window = config.local_window
    assert window is not None
    default_windows = sorted(set(window)) if isinstance(window, list) else [window]
    assert isinstance(config.num_global_heads, int)
    dtype: torch.dtype = getattr(torch, flags.dtype)
    plans = plan_layouts(
        config,
        flags.length,
        global_heads=flags.global_heads or [config.num_global_heads],
        windows=flags.windows or default_windows,
        hybrid_window=flags.hybrid_window,
        batch=flags.batch,
        dtype=dtype,
        memory=None if flags.memory is None else parse_bytes("--memory", flags.memory),
    )
    weights = parameter_count(config) * dtype.itemsize
    if flags.json:
        print(json.dumps(_content(flags, config, weights, plans), indent=2))
    else:
        _print_tables(flags, config, weights, plans)
    return 0


def _config(flags: PlanFlags) -> LongShortConfig:
    """Make a config of the model's shape; the layout of its heads is chosen later."""
    heads, head_dim, hidden_size = flags.heads, flags.head_dim, flags.hidden_size
    if hidden_size is None and (heads or head_dim):
        shape = preset(flags.preset)
        hidden_size = (heads or shape.num_attention_heads) * (head_dim or shape.head_dim)
    changes: dict[str, Any] = {
        "num_hidden_layers": flags.layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_key_value_heads": flags.kv_heads,
        "hidden_size": hidden_size,
        "vocab_size": flags.vocab_size,
        "sink_tokens": flags.sink_tokens,
        "local_window": flags.windows[0] if flags.windows else None,
    }
    return preset(
        flags.preset,
        layouts=None,
        num_global_heads=None,
        position_embedding="none",
        global_position_embedding=None,
        **{name: value for name, value in changes.items() if value is not None},
    )


def _print_tables(flags: PlanFlags, config: LongShortConfig, weights: int, plans: list[LayoutPlan]) -> None:
    output = console()
    heads = f"{config.num_attention_heads} heads"
    if config.num_key_value_heads < config.num_attention_heads:
        heads += f" on {config.num_key_value_heads} key/value heads"
    sequences = "" if flags.batch == 1 else f"{flags.batch} sequences of "
    output.print(
        f"{config.num_hidden_layers} layers, {heads} of {config.head_dim}, hidden size {config.hidden_size}: "
        f"weights of {format_bytes(weights)} in {flags.dtype}; {sequences}{flags.length:,} tokens\n",
        markup=False,
    )
    mhsa = plans[0]
    memory = plain_table("memory", "cache", "of MHSA's", "read per step", "of MHSA's")
    if flags.memory is not None:
        memory.add_column(f"longest in {flags.memory}", justify="right")
    operations = plain_table(
        "FLOPs", "prefill matrices", "attention", "of MHSA's", "decode matrices", "attention"
    )
    for plan in plans:
        cells = [
            format_bytes(plan.cache_bytes),
            f"{plan.cache_bytes / mhsa.cache_bytes:.1%}",
            format_bytes(plan.decode_bytes),
            f"{plan.decode_bytes / mhsa.decode_bytes:.1%}",
        ]
        if flags.memory is not None:
            cells.append("any" if plan.longest is None else f"{plan.longest:,}")
        memory.add_row(plan.name, *cells)
        share = f"{plan.prefill.total / mhsa.prefill.total:.1%}"
        operations.add_row(plan.name, *_split(plan.prefill), share, *_split(plan.decode))
    output.print(memory)
    output.print()
    output.print(operations)


def _split(flops: Flops) -> list[str]:
    """Format the operations of matrices, including that for logits, and of attention, with their shares."""
    matrices = flops.matrices + flops.lm_head
    return [f"{format_count(part)} ({part / flops.total:3.0%})" for part in (matrices, flops.attention)]


def _content(
    flags: PlanFlags, config: LongShortConfig, weights: int, plans: list[LayoutPlan]
) -> dict[str, Any]:
    mhsa = plans[0]
    return {
        "length": flags.length,
        "batch": flags.batch,
        "dtype": flags.dtype,
        "memory": None if flags.memory is None else parse_bytes("--memory", flags.memory),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "sink_tokens": config.sink_tokens,
        "weights_bytes": weights,
        "layouts": [
            {
                "name": plan.name,
                "global_heads": plan.config.num_global_heads,
                "window": None if plan is mhsa else plan.config.local_window,
                "cache_bytes": plan.cache_bytes,
                "cache_share": plan.cache_bytes / mhsa.cache_bytes,
                "prefill_flops": asdict(plan.prefill),
                "prefill_share": plan.prefill.total / mhsa.prefill.total,
                "decode_flops": asdict(plan.decode),
                "decode_share": plan.decode.total / mhsa.decode.total,
                "decode_bytes": plan.decode_bytes,
                "decode_bytes_share": plan.decode_bytes / mhsa.decode_bytes,
                "longest": plan.longest,
            }
            for plan in plans
        ],
    }

"""What ranks that share sequences send each other, in a few words at the start of a run."""

from __future__ import annotations

from collections import Counter

from longshort.distributed import Traffic, all_gather_bytes, part_length, plan_context
from longshort.model import LongShortConfig
from longshort.training.parallel import Ranks
from longshort.training.run import RunConfig


def describe_context(run: RunConfig, ranks: Ranks) -> str:
    """Describe the parts, the bytes per layer beside those of an all-gather, and how even the work is, for
    sequences of one document."""
    assert ranks.context is not None and run.training.sequence_length is not None
    settings, config = run.training, LongShortConfig.from_dict(run.model)
    size = ranks.context_size
    batch = settings.micro_batch_size or settings.batch_size // ranks.data_size
    part = part_length(run.training.sequence_length, size)
    plan = plan_context(size, part * size, batch=batch)
    is_half = settings.precision == "bf16" or config.attention_precision.startswith("bf16")
    shape = config.head_dim, 2 if is_half else 4
    lines = [
        f"sequences are cut into {size} parts of {part:,} tokens; each process sends per layer, forward:"
    ]
    for layout, layers in Counter(config.head_layouts()).items():
        sent = Traffic.mean(plan.traffic(layout, *shape))
        whole = all_gather_bytes(layout, *shape, plan.length, size, batch=batch)
        kinds = {"halo": sent.halo, "sinks": sent.sinks, "gather": sent.gather, "lent": sent.lent}
        parts = ", ".join(f"{name} {count / 1e6:.3g}" for name, count in kinds.items() if count)
        lines.append(
            f"  {sent.total / 1e6:.3g} MB in {layers} layers ({parts or 'nothing'}); "
            f"an all-gather of all heads would be {whole / 1e6:.3g} MB"
        )
    lines.append(
        f"  the most visible pairs of a process are {plan.imbalance:.3f} of the mean "
        f"({plan.imbalance_before:.3f} without lending)"
    )
    return "\n".join(lines)

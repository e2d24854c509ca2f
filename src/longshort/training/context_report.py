"""What ranks that share sequences send each other, in a few words at the start of a run."""

from __future__ import annotations

from collections import Counter

from longshort.distributed import Traffic, all_gather_bytes, part_length, plan_context, uses_ring
from longshort.model import LongShortConfig
from longshort.model.scaling.setup import attention_size
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
    shape = config.head_dim, attention_size(config, settings.precision)
    lines = [
        f"sequences are cut into {size} parts of {part:,} tokens; each process sends per layer, forward:"
    ]
    plans = []
    for layout, layers in Counter(config.head_layouts()).items():
        plan = plan_context(size, part * size, batch=batch)
        is_ring = uses_ring(layout, plan, *shape, settings.gather_memory)
        if is_ring or not layout.global_heads:
            plan = plan.without_lending()
        plans.append(plan)
        sent = Traffic.mean(plan.traffic(layout, *shape))
        whole = all_gather_bytes(layout, *shape, plan.length, size, batch=batch)
        far = "ring" if is_ring else "gather"
        kinds = {"halo": sent.halo, "sinks": sent.sinks, far: sent.gather, "lent": sent.lent}
        parts = ", ".join(f"{name} {count / 1e6:.3g}" for name, count in kinds.items() if count)
        lines.append(
            f"  {sent.total / 1e6:.3g} MB in {layers} layers ({parts or 'nothing'}); "
            f"an all-gather of all heads would be {whole / 1e6:.3g} MB"
        )
    worst = max(plans, key=lambda plan: plan.imbalance)
    lines.append(
        f"  the most visible pairs of a process are {worst.imbalance:.3f} of the mean "
        f"({worst.imbalance_before:.3f} without lending)"
    )
    return "\n".join(lines)

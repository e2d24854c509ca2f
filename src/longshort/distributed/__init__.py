"""Attention over a sequence that is cut across ranks: only the keys of the global heads travel far."""

from longshort.distributed.agreement import require_agreement
from longshort.distributed.attention import context_attention, uses_ring
from longshort.distributed.context import ContextParallel
from longshort.distributed.costs import Traffic, all_gather_bytes, layer_traffic
from longshort.distributed.exchange import keep_exchanges
from longshort.distributed.influence import check_influence, visible_pairs
from longshort.distributed.partition import join_parts, part_length, part_positions, take_part
from longshort.distributed.plan import Block, ContextPlan, plan_context
from longshort.distributed.sharded import put_values

__all__ = [
    "Block",
    "ContextParallel",
    "ContextPlan",
    "Traffic",
    "all_gather_bytes",
    "check_influence",
    "context_attention",
    "join_parts",
    "keep_exchanges",
    "layer_traffic",
    "part_length",
    "part_positions",
    "plan_context",
    "put_values",
    "require_agreement",
    "take_part",
    "uses_ring",
    "visible_pairs",
]

"""The pairs of queries and keys that an observed call of attention lets see each other."""

from __future__ import annotations

import torch
from torch import Tensor

from longshort.layers import Observation


def are_visible(
    observation: Observation, queries: Tensor, keys: Tensor, window: int | None, is_sink: Tensor | None
) -> Tensor:
    """Mark the visible pairs of queries and keys, given by position: (batch or 1, 1, queries, keys)."""
    distances = queries[:, None] - keys
    visible = (distances >= 0)[None]
    if window is not None:
        near = distances < window
        visible = visible & (near if is_sink is None else near | is_sink[:, None, keys])
    segment_ids = observation.options.get("segment_ids")
    if segment_ids is not None:
        query_ids = segment_ids[:, queries, None]
        visible = visible & (query_ids == segment_ids[:, None, keys]) & (query_ids >= 0)
    return visible[:, None]


def sink_keys(
    segment_ids: Tensor | None, kv_len: int, sink_tokens: int, device: torch.device
) -> Tensor | None:
    """Mark the keys that are sink tokens of their segment: (batch or 1, kv_len); None if there are none."""
    if sink_tokens == 0:
        return None
    positions = torch.arange(kv_len, device=device)[None]
    if segment_ids is None:
        return positions < sink_tokens
    ids, order = segment_ids.sort(dim=-1, stable=True)  # an id may occur in several runs
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    places = positions - (positions * begins).cummax(-1).values
    return torch.empty_like(begins).scatter_(1, order, places < sink_tokens)


def sink_keys_of(observation: Observation, sink_tokens: int) -> Tensor | None:
    """Mark the sink tokens among the keys of an observed call, as `sink_keys`."""
    segment_ids, k = observation.options.get("segment_ids"), observation.k
    return sink_keys(segment_ids, k.shape[2], sink_tokens, k.device)

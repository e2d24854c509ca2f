"""Attention to the store of one group of heads, by any backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longshort.attention import attention, with_sink_logits
from longshort.cache.distant import attend_with_distant_sinks
from longshort.cache.sinks import SinkTokens
from longshort.cache.store import Store, gather_keys
from longshort.layout import HeadGroup, HeadLayout


class Group:
    """Heads of one window.

    Attributes:
        heads: index of the query heads, a slice where they are neighbours.
        layout: the layout of these heads alone.
    """

    def __init__(self, group: HeadGroup, layout: HeadLayout) -> None:
        self.heads = _index(group.heads)
        self._kv_heads = _index(group.kv_heads)
        self._is_all = len(group.heads) == layout.num_heads
        self.layout = HeadLayout((group.window,) * len(group.heads), len(group.kv_heads), layout.sink_tokens)

    def of_kv_heads(self, x: Tensor) -> Tensor:
        """The group's part of keys or values."""
        return x if self._is_all else x[:, self._kv_heads]


def _index(heads: Sequence[int]) -> slice | list[int]:
    is_run = list(heads) == list(range(heads[0], heads[-1] + 1))
    return slice(heads[0], heads[-1] + 1) if is_run else list(heads)


def attend_to_store(
    store: Store,
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_tokens: SinkTokens | None,
    options: dict[str, Any],
) -> Tensor:
    """Append to the store of one group, and attend to what it holds, which may be less afterwards."""
    ids, start = options["segment_ids"], store.length
    if store.window is None:
        store.append(k, v, sink_tokens)
        return attention(q, *store.view(0, store.length), group.layout, **options)
    begin = store.first if store.sink_tokens else max(store.first, start - store.window + 1)
    near_k, near_v = k, v
    if begin < start:
        old_k, old_v = store.view(begin, start)
        near_k, near_v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
    if store.sink_tokens and store.first > 0:
        assert sink_tokens is not None
        out = _attend_with_distant_sinks(store, begin, q, near_k, near_v, sink_tokens, options)
    else:
        options = {**options, "segment_ids": None if ids is None else ids[:, begin:]}
        out = attention(q, near_k, near_v, group.layout, **options)
    store.append(k, v, sink_tokens)
    return out


def _attend_with_distant_sinks(
    store: Store,
    begin: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_tokens: SinkTokens,
    options: dict[str, Any],
) -> Tensor:
    """Keys from position `begin` on, and the sinks, of which the store has those before."""
    sink_logits, scale = options["sink_logits"], options["scale"]
    positions = sink_tokens.positions
    assert store.window is not None and positions is not None
    _, moved, moved_positions = store.tensors()
    rows = moved_positions.shape[1]
    is_moved = (moved_positions >= 0)[:, None, :, None]
    index = (positions - begin).clamp(0, k.shape[2] - 1)
    sinks = []
    for x, moved_x in zip((k, v), moved, strict=True):
        sink = gather_keys(x[None], index)[0]
        sink[:, :, :rows] = torch.where(is_moved, moved_x, sink[:, :, :rows])
        sinks.append(sink)
    out, lse = attend_with_distant_sinks(
        q,
        torch.cat([sinks[0], k], dim=2),
        torch.cat([sinks[1], v], dim=2),
        sink_positions=positions,
        begin=begin,
        window=store.window,
        segment_ids=options["segment_ids"],
        scale=1 / math.sqrt(q.shape[3]) if scale is None else scale,
        softcap=options["softcap"],
        alibi_slopes=options["alibi_slopes"],
        round_probabilities=options["round_probabilities"],
    )
    return out if sink_logits is None else with_sink_logits(out, lse, sink_logits.to(lse.dtype)).to(q.dtype)

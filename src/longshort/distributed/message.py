"""The one message of a layer's exchange: halos and sinks of local heads, and lent queries of global heads.

Both sides derive from the plan, in one order, what each pair of ranks sends, so that the message is numbers
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longshort.distributed.exchange import begin_exchange, end_exchange
from longshort.distributed.plan import Block, ContextPlan
from longshort.layout import HeadGroup, HeadLayout


class _Item(NamedTuple):
    """A tensor that one rank sends to another: the halo of a group of heads, its sinks, or lent queries."""

    kind: str
    group: int
    """Index of the layout's group, for halos and sinks."""
    where: Any
    """Halo: (start, end). Sinks: triples of batch row, slot and position. Queries: the `Block`."""
    shape: tuple[int, ...]


class Message:
    """The exchange of one layer.

    Args:
        plan: the plan of the sequence.
        layout: the layout of the layer.
        rank: this rank.
        group: process group of the ranks.
        head_dim: width of a head.
    """

    def __init__(self, plan: ContextPlan, layout: HeadLayout, rank: int, group: Any, head_dim: int) -> None:
        self._plan, self._layout, self._rank, self._group, self._head_dim = (
            plan,
            layout,
            rank,
            group,
            head_dim,
        )
        ranks = range(plan.ranks)
        self._outgoing = [list(self._items(rank, other)) for other in ranks]
        self._incoming = [list(self._items(other, rank)) for other in ranks]
        self._send = [_numel(items) for items in self._outgoing]
        self._receive = [_numel(items) for items in self._incoming]

    def begin(self, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None = None) -> None:
        """Begin to send this rank's halos, sinks and lent queries.

        No sink logits are sent: they only bring the exchange into every rank's graph, if nothing else does.
        """
        parts = [self._packed(item, q, k, v) for items in self._outgoing for item in items]
        # all always take part, so that their gradients pass the exchange on every rank
        empty = [x.reshape(-1)[:0].to(q.dtype) for x in (q, k, v, sink_logits) if x is not None]
        message = torch.cat([part.reshape(-1) for part in parts] + empty)
        self._pending = begin_exchange(message, self._send, self._receive, self._group)

    def end(self) -> Received:
        """Wait for what the other ranks sent."""
        received = end_exchange(self._pending)
        del self._pending
        halos: dict[int, list[Tensor]] = {}
        sinks: dict[int, list[tuple[Sequence[tuple[int, int, int]], Tensor]]] = {}
        queries: list[tuple[Block, Tensor]] = []
        at = 0
        for item in (item for items in self._incoming for item in items):
            size = _product(item.shape)
            values = received[at : at + size].view(item.shape)
            at += size
            if item.kind == "halo":
                halos.setdefault(item.group, []).append(values)
            elif item.kind == "sinks":
                sinks.setdefault(item.group, []).append((item.where, values))
            else:
                queries.append((item.where, values))
        return Received(halos, sinks, queries, received[:0])

    def _items(self, source: int, target: int) -> Iterator[_Item]:
        plan = self._plan
        begin, end = source * plan.part, (source + 1) * plan.part
        if source < target:
            for index, group in enumerate(self._layout.groups):
                if group.window is None:
                    continue
                halo, heads = plan.halo(group, self._layout.sink_tokens, target), len(group.kv_heads)
                start = max(halo.start, begin)
                if start < end:
                    shape = (2, plan.batch, heads, end - start, self._head_dim)
                    yield _Item("halo", index, (start - begin, end - begin), shape)
                places = [
                    (row, slot, position - begin)
                    for row, positions in enumerate(halo.sinks)
                    for slot, position in enumerate(positions)
                    if begin <= position < end
                ]
                if places:
                    yield _Item("sinks", index, places, (2, len(places), heads, self._head_dim))
        for block in plan.blocks:
            if (block.lender, block.borrower) == (source, target):
                rows = block.rows[1] - block.rows[0]
                shape = (rows, len(self._layout.global_heads), block.end - block.start, self._head_dim)
                yield _Item("queries", -1, block, shape)

    def _packed(self, item: _Item, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if item.kind == "queries":
            block: Block = item.where
            begin = self._rank * self._plan.part
            return select_heads(q, self._layout.global_heads)[
                slice(*block.rows), :, block.start - begin : block.end - begin
            ]
        group = self._layout.groups[item.group]
        keys, values = select_heads(k, group.kv_heads), select_heads(v, group.kv_heads)
        if item.kind == "halo":
            inside = slice(*item.where)
            return torch.stack([keys[:, :, inside], values[:, :, inside]])
        rows, _, positions = (list(x) for x in zip(*item.where, strict=True))
        return torch.stack([keys[rows, :, positions], values[rows, :, positions]])


class Received(NamedTuple):
    """What came from other ranks.

    Attributes:
        halos: keys and values just before the part, by group of heads, (2, batch, kv_heads, keys, dim), from
            one rank each, in order.
        sinks: the places (batch row, slot, position) of sinks, by group of heads, and their keys and values,
            (2, places, kv_heads, dim).
        queries: borrowed blocks, and their queries, (rows, heads, queries, dim).
        nothing: a tensor without elements that belongs to the exchange.
    """

    halos: dict[int, list[Tensor]]
    sinks: dict[int, list[tuple[Sequence[tuple[int, int, int]], Tensor]]]
    queries: list[tuple[Block, Tensor]]
    nothing: Tensor

    def earlier_keys(self, group: int, slots: int, own: Tensor) -> Tensor:
        """Return the keys and values of a group's sinks and halo, then its own: (2, batch, kv_heads, keys,
        dim)."""
        parts = [*self.halos.get(group, []), own]
        if slots:
            _, batch, heads, _, dim = own.shape
            sinks = own.new_zeros(2, batch, slots, heads, dim)
            for places, values in self.sinks.get(group, []):
                rows, to, _ = (torch.tensor(x, device=own.device) for x in zip(*places, strict=True))
                sinks = sinks.index_put((torch.arange(2, device=own.device)[:, None], rows, to), values)
            parts.insert(0, sinks.transpose(2, 3))
        return torch.cat(parts, 3) if len(parts) > 1 else own


def select_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Return some heads of (batch, heads, sequence, dim): a view if they are adjacent."""
    first, count = heads[0], len(heads)
    if tuple(heads) == tuple(range(first, first + count)):
        return x.narrow(1, first, count)
    return x[:, list(heads)]


def _numel(items: list[_Item]) -> int:
    return sum(_product(item.shape) for item in items)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def group_layout(group: HeadGroup, sink_tokens: int = 0) -> HeadLayout:
    """Return the layout of one group's heads alone."""
    return HeadLayout(
        (group.window,) * len(group.heads), len(group.kv_heads), 0 if group.window is None else sink_tokens
    )

"""Attention over a sequence cut across ranks: `attention()` on each part, with what others have for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from longshort.attention import AttentionStats, attention, cast_as_autocast, check_call
from longshort.checks import require_integer
from longshort.distributed.agreement import require_agreement
from longshort.distributed.exchange import (
    Pending,
    begin_exchange,
    begin_gather,
    end_exchange,
    end_gather,
    gather,
)
from longshort.distributed.message import Message, Received, group_layout, select_heads
from longshort.distributed.plan import ContextPlan, Span, plan_context
from longshort.distributed.ring import ring_attention
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@overload
def context_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, *, return_stats: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def context_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, AttentionStats]: ...
def context_attention(
    q: Float[Tensor, "batch heads part head_dim"],
    k: Float[Tensor, "batch kv_heads part head_dim"],
    v: Float[Tensor, "batch kv_heads part head_dim"],
    layout: HeadLayout,
    *,
    group: dist.ProcessGroup | None = None,
    segment_ids: Int[Tensor, "batch part"] | None = None,
    plan: ContextPlan | None = None,
    gather_memory: int | None = None,
    lend: bool = True,
    return_stats: bool = False,
    check: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Causal attention over a sequence of which each rank holds one contiguous part, in the order of ranks.

    All ranks of the group must call it together, and if one of them computes gradients, all must go through
    the backward pass. Each gets the rows of its own queries, and the gradients of its own q, k and v.

    Args:
        q: this rank's part; parts are of one length, see `take_part`. Otherwise as for `attention`.
        k: as q.
        v: as q.
        layout: as for `attention`. ALiBi does not go with sink tokens.
        group: the ranks; None: all processes.
        segment_ids: the segment ids of this rank's part, negative is padding; given on all ranks or on none.
        plan: the plan of the whole sequence, from `plan_context`; segment_ids are then its own. None: made
            here, from the segment ids that are gathered, for which a GPU is waited for.
        gather_memory: bytes that the gathered keys and values of global heads may take; beyond that, the
            parts go round in a ring, in more time, without lending and without ALiBi. None: any.
        lend: let ranks lend queries of global heads, if no plan is given.
        return_stats: also return `AttentionStats`: lse of this rank's rows, max_logit and entropy of the
            whole sequence. It changes no bit of the output.
        check: compare the calls of all ranks first: one small message, for which a GPU is waited for.
        options: `causal` (only True), `scale`, `softcap`, `alibi_slopes`, `sink_logits`,
            `round_probabilities` and `backend` of `attention`. The gradient of sink_logits on a rank is of
            the queries that it computed; that of the whole sequence is the sum over ranks.

    Returns:
        (batch, heads, part, head_dim), as `attention` does.

    Raises:
        TypeError, ValueError: as `attention` does; or the ranks disagree, on every rank alike.
    """
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("group must be given, or torch.distributed initialized, got neither")
    q, k, v = cast_as_autocast(q, k, v)
    backend, causal = options.pop("backend", "auto"), options.pop("causal", True)
    error = None
    try:
        check_call(
            q, k, v, layout, segment_ids=segment_ids, backend=backend, return_stats=return_stats,
            causal=causal, **options,
        )  # fmt: skip
        _check_cut(q, k, layout, segment_ids, plan, gather_memory, group, causal, options)
    except (TypeError, ValueError) as caught:
        error = caught
    if check:
        asked = {"return_stats": return_stats, "gather_memory": gather_memory, "lend": lend, **options}
        _compare(q, k, v, layout, segment_ids, plan, asked, group, error)
    if error is not None:
        raise error
    if plan is None:
        plan = plan_of_parts(segment_ids, q.shape[0], q.shape[2], group, lend=lend)
    is_ring = uses_ring(layout, plan, q.shape[3], q.element_size(), gather_memory)
    if is_ring and options.get("alibi_slopes") is not None:
        gathered = gathered_bytes(layout, plan, q.shape[3], q.element_size())
        raise ValueError(
            f"alibi_slopes do not go with a ring: gather_memory is {gather_memory}, needed {gathered}"
        )
    if is_ring or not layout.global_heads:
        plan = plan.without_lending()
    if not q.numel():
        return attention(q, k, v, layout, return_stats=return_stats, backend=backend, **options)
    return _Call(layout, plan, group, is_ring, return_stats, {**options, "backend": backend}).attend(q, k, v)


def _check_cut(
    q: Tensor, k: Tensor, layout: HeadLayout, segment_ids: Tensor | None, plan: Any, gather_memory: Any,
    group: dist.ProcessGroup, causal: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    """Refuse what `attention` allows on one process and attention across ranks does not."""
    if not causal:
        raise ValueError("causal must be True across ranks, got False")
    refused = refusal(layout, options.get("alibi_slopes"))
    if refused is not None:
        raise ValueError(refused)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must be as long as q ({q.shape[2]}): no cache is cut, got {k.shape[2]}")
    if gather_memory is not None:
        require_integer("gather_memory", gather_memory, minimum=0)
    if plan is None:
        return
    if not isinstance(plan, ContextPlan):
        raise TypeError(f"plan must be a ContextPlan or None, got {type(plan).__name__}")
    if segment_ids is not None:
        raise ValueError("segment_ids must be None with a plan, which has those of the whole sequence")
    wanted, got = (q.shape[0], q.shape[2], group.size()), (plan.batch, plan.part, plan.ranks)
    if got != wanted:
        raise ValueError(f"plan must be of (batch, part, ranks) = {wanted}, got {got}")


def refusal(layout: Any, alibi_slopes: Any) -> str | None:
    """Return why attention across ranks does not serve heads, or None."""
    if (
        isinstance(layout, HeadLayout)
        and layout.sink_tokens
        and layout.local_heads
        and alibi_slopes is not None
    ):
        return "alibi_slopes do not go with sink_tokens across ranks, where distances to sinks are not kept"
    return None


def gathered_bytes(layout: HeadLayout, plan: ContextPlan, head_dim: int, itemsize: int) -> int:
    """Count the bytes of the gathered keys and values of a layer's global heads, on each rank."""
    heads = layout.num_kv_heads if not layout.local_heads else len(layout.global_heads) // layout.group_size
    return 2 * heads * plan.batch * plan.length * head_dim * itemsize


def uses_ring(
    layout: HeadLayout, plan: ContextPlan, head_dim: int, itemsize: int, gather_memory: int | None
) -> bool:
    """Return whether the keys and values of a layer's global heads go round in a ring, since gathered they
    would take more than `gather_memory` bytes."""
    return gather_memory is not None and gathered_bytes(layout, plan, head_dim, itemsize) > gather_memory


def plan_of_parts(
    segment_ids: Tensor | None, batch: int, part: int, group: dist.ProcessGroup, *, lend: bool = True
) -> ContextPlan:
    """Plan from the segment ids of each rank's part, which are gathered."""
    ranks = group.size()
    if segment_ids is None:
        return plan_context(ranks, ranks * part, batch=batch, lend=lend)
    ids = gather(segment_ids.to(torch.int64), group).cpu()
    whole = ids.movedim(0, 1).reshape(batch, ranks * part)
    return plan_context(ranks, ranks * part, batch=batch, segment_ids=whole, lend=lend)


def _compare(
    q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, segment_ids: Any, plan: ContextPlan | None,
    asked: dict[str, Any], group: dist.ProcessGroup, error: Exception | None,
) -> None:  # fmt: skip
    """Raise the error of this rank, or one that says how the ranks differ."""
    facts = {"the error": error}
    if error is None:
        has_gradients = torch.is_grad_enabled()
        facts = {
            "the error": None,
            **{f"shape of {name}": tuple(x.shape) for name, x in (("q", q), ("k", k), ("v", v))},
            "dtype": q.dtype,
            "layout": layout,
            # of each: an exchange is in a rank's graph if what it sends is
            **{
                f"requires_grad of {name}": has_gradients and x.requires_grad
                for name, x in (("q", q), ("k", k), ("v", v))
            },
            "segment_ids": "none" if segment_ids is None else "given",
            "plan": None if plan is None else (plan.part, plan.blocks, plan.digest),
            **{
                name: ("a tensor", value.requires_grad and has_gradients)
                if isinstance(value, Tensor)
                else value
                for name, value in asked.items()
                if value is not None or name == "gather_memory"
            },
        }
    try:
        require_agreement(facts, group, q.device if isinstance(q, Tensor) else torch.device("cpu"))
    except ValueError as difference:
        raise (error or difference) from None


class _Measured(NamedTuple):
    """Statistics of one call of `attention`: (heads,) each, and the rows that see something."""

    max_logit: Tensor
    entropy: Tensor
    rows: int


@dataclass(frozen=True)
class _Call:
    """One layer's attention on one rank."""

    layout: HeadLayout
    plan: ContextPlan
    group: dist.ProcessGroup
    is_ring: bool
    return_stats: bool
    options: dict[str, Any]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        plan, layout, rank = self.plan, self.layout, self.group.rank()
        has_local, has_global = bool(layout.local_heads), bool(layout.global_heads)
        empties: list[Tensor] = []
        outputs: dict[tuple[int, ...], Tensor] = {}
        lses: dict[tuple[int, ...], Tensor] = {}
        measured: dict[tuple[int, ...], list[_Measured]] = {}
        message = received = gathering = None
        global_heads = next((group for group in layout.groups if group.window is None), None)
        if has_local or plan.blocks:
            message = Message(plan, layout, rank, self.group, q.shape[3])
            message.begin(q, k, v, self.options.get("sink_logits"))
        if global_heads is not None and not self.is_ring:
            own = torch.stack([select_heads(x, global_heads.kv_heads) for x in (k, v)])
            gathering = begin_gather(own, self.group)
        if message is not None:
            received = message.end()
            empties.append(received.nothing)
        for index, group in enumerate(layout.groups):
            if group.window is None:
                continue
            assert received is not None
            outputs[group.heads], lses[group.heads], found = self._attend_locally(index, received, q, k, v)
            measured[group.heads] = [found]
        if has_global:
            assert global_heads is not None
            own_q = select_heads(q, global_heads.heads)
            if gathering is None:
                result = self._ring(own_q, k, v)
            else:
                gathered = end_gather(gathering).unflatten(1, own.shape)
                empties.append(gathered.reshape(-1)[:0])
                result = self._attend_globally(gathered, received, own_q, empties)
            outputs[global_heads.heads], lses[global_heads.heads], measured[global_heads.heads] = result
        out = self._in_order(outputs, [x.view(q.shape[0], 0, q.shape[2], q.shape[3]) for x in empties])
        if not self.return_stats:
            return out
        max_logit, entropy = self._reduced(measured, q.device)
        return out, AttentionStats(self._in_order(lses, []), max_logit, entropy)

    def _attend_locally(
        self, index: int, received: Received, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, _Measured]:
        plan, rank = self.plan, self.group.rank()
        group = self.layout.groups[index]
        halo = plan.halo(group, self.layout.sink_tokens, rank)
        own = torch.stack([select_heads(x, group.kv_heads) for x in (k, v)])
        keys, values = received.earlier_keys(index, halo.slots, own)
        begin, end = rank * plan.part, (rank + 1) * plan.part
        ids = None
        if plan.segment_ids is not None:
            sinks = torch.full((plan.batch, halo.slots), -1)
            for row, positions in enumerate(halo.sinks):
                sinks[row, : len(positions)] = plan.segment_ids[row, list(positions)]
            ids = torch.cat([sinks, plan.segment_ids[:, halo.start : end]], 1)
        layout = group_layout(group, self.layout.sink_tokens)
        rows = self._rows_of((0, plan.batch), begin, end)
        return self._call(select_heads(q, group.heads), keys, values, layout, group.heads, ids, rows)

    def _attend_globally(
        self, gathered: Tensor, received: Received | None, q: Tensor, empties: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[_Measured]]:
        """Attend from borrowed queries first, whose outputs go back while this rank's own are computed."""
        plan, rank = self.plan, self.group.rank()
        # (ranks, 2, batch, heads, part, dim) -> (2, batch, heads, sequence, dim)
        keys, values = gathered.movedim(0, 3).flatten(3, 4)
        measured: list[_Measured] = []
        begin = rank * plan.part
        back = _Return(plan, rank, self.group, q, self.return_stats)
        if plan.blocks:
            assert received is not None
            lent_queries = dict(received.queries)
            for block, span in zip(
                [block for block in plan.blocks if block.borrower == rank], plan.borrowed(rank), strict=True
            ):
                out, lse, found = self._attend_span(span, lent_queries[block], keys, values)
                back.add(block, out, lse)
                measured.append(found)
            back.begin(received.nothing)
        pieces: list[tuple[tuple[int, int], int, Tensor, Tensor]] = []
        for span in plan.spans(rank):
            queries = q[slice(*span.rows), :, span.start - begin : span.end - begin]
            out, lse, found = self._attend_span(span, queries, keys, values)
            pieces.append((span.rows, span.start, out, lse))
            measured.append(found)
        if plan.blocks:
            pieces.extend(back.end(empties))
        out, lse = _joined(pieces, plan.batch)
        return out, lse, measured

    def _attend_span(
        self, span: Span, q: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, _Measured]:
        heads = self.layout.global_heads
        group = next(group for group in self.layout.groups if group.window is None)
        rows, visible = slice(*span.rows), slice(span.first_key, span.end)
        ids = None if self.plan.segment_ids is None else self.plan.segment_ids[rows, visible]
        count = self._rows_of(span.rows, span.start, span.end)
        return self._call(
            q, keys[rows, :, visible], values[rows, :, visible], group_layout(group), heads, ids, count
        )

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: HeadLayout,
        heads: Sequence[int],
        ids: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor, _Measured]:
        """Attend with some heads; without statistics lse and what is measured have no elements."""
        options = dict(self.options)
        for name in ("alibi_slopes", "sink_logits"):
            if options.get(name) is not None:
                options[name] = options[name][list(heads)]
        if ids is not None:
            options["segment_ids"] = ids.to(q.device, non_blocking=True)
        if not self.return_stats:
            nothing = q.new_empty(0)
            return attention(q, k, v, layout, **options), nothing, _Measured(nothing, nothing, 0)
        out, stats = attention(q, k, v, layout, return_stats=True, **options)
        return out, stats.lse, _Measured(stats.max_logit, stats.entropy, rows)

    def _ring(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[_Measured]]:
        group = next(group for group in self.layout.groups if group.window is None)
        options = dict(self.options)
        if options.get("sink_logits") is not None:
            options["sink_logits"] = options["sink_logits"][list(group.heads)]
        out, lse, max_logit, entropy = ring_attention(
            q, select_heads(k, group.kv_heads), select_heads(v, group.kv_heads), group_layout(group),
            self.plan, self.group, with_stats=self.return_stats, **options,
        )  # fmt: skip
        begin = self.group.rank() * self.plan.part
        rows = self._rows_of((0, self.plan.batch), begin, begin + self.plan.part)
        return out, lse, [_Measured(max_logit, entropy, rows)]

    def _rows_of(self, rows: tuple[int, int], start: int, end: int) -> int:
        """Count the queries that see something: all that are not padding see themselves."""
        if self.plan.segment_ids is None:
            return (rows[1] - rows[0]) * (end - start)
        return int((self.plan.segment_ids[slice(*rows), start:end] >= 0).sum())

    def _in_order(self, by_heads: dict[tuple[int, ...], Tensor], empties: list[Tensor]) -> Tensor:
        """Join what the groups computed in the order of heads."""
        joined = torch.cat([*by_heads.values(), *empties], 1)
        heads = [head for group in by_heads for head in group]
        if heads == sorted(heads):
            return joined
        places = torch.tensor(heads, device=joined.device).argsort()
        return joined.index_select(1, places)

    def _reduced(
        self, measured: dict[tuple[int, ...], list[_Measured]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Combine statistics over calls and ranks."""
        first = next(iter(measured.values()))[0].max_logit
        both = torch.zeros(2, self.layout.num_heads, dtype=first.dtype, device=device)
        for heads, calls in measured.items():
            places = list(heads)
            for call in calls:
                both[0, places] = torch.maximum(both[0, places], call.max_logit.detach())
                both[1, places] += call.rows * call.entropy.detach()
        everywhere = gather(both, self.group)
        total = self._rows_of((0, self.plan.batch), 0, self.plan.length)
        return everywhere[:, 0].amax(0), everywhere[:, 1].sum(0) / max(1, total)


class _Return:
    """The exchange that brings the outputs of lent queries back, and their lse if there are statistics."""

    def __init__(
        self, plan: ContextPlan, rank: int, group: dist.ProcessGroup, q: Tensor, with_lse: bool
    ) -> None:
        self._plan, self._rank, self._group, self._with_lse = plan, rank, group, with_lse
        self._heads, self._head_dim = q.shape[1], q.shape[3]
        self._q = q
        self._outputs: dict[Any, tuple[Tensor, Tensor]] = {}

    def add(self, block: Any, out: Tensor, lse: Tensor) -> None:
        self._outputs[block] = out, lse

    def begin(self, nothing: Tensor) -> None:
        """Begin to send the outputs that were added.

        Args:
            nothing: without elements, of the first exchange: so the return is in the graph of every rank.
        """
        self._out = self._begun([nothing, *(out for out, _ in self._sorted())], self._head_dim, self._q.dtype)
        if self._with_lse:
            precise = torch.float64 if self._q.dtype == torch.float64 else torch.float32
            self._lse = self._begun([nothing, *(lse for _, lse in self._sorted())], 1, precise)

    def end(self, empties: list[Tensor]) -> list[tuple[tuple[int, int], int, Tensor, Tensor]]:
        """Return the pieces of this rank's output that others computed."""
        blocks = [block for other in range(self._plan.ranks) for block in self._blocks(self._rank, other)]
        outs = self._ended(self._out, blocks, self._head_dim, empties)
        lses = [self._q.new_empty(0)] * len(blocks)
        if self._with_lse:
            lses = [x.squeeze(-1) for x in self._ended(self._lse, blocks, 1, empties)]
        return [
            (block.rows, block.start, out, lse) for block, out, lse in zip(blocks, outs, lses, strict=True)
        ]

    def _blocks(self, lender: int, borrower: int) -> list[Any]:
        return [block for block in self._plan.blocks if (block.lender, block.borrower) == (lender, borrower)]

    def _sorted(self) -> list[tuple[Tensor, Tensor]]:
        ranks = range(self._plan.ranks)
        return [self._outputs[block] for other in ranks for block in self._blocks(other, self._rank)]

    def _splits(self, width: int) -> tuple[list[int], list[int]]:
        ranks = range(self._plan.ranks)
        sizes = [
            [sum(block.count for block in self._blocks(*pair)) * self._heads * width for pair in pairs]
            for pairs in ([(other, self._rank) for other in ranks], [(self._rank, other) for other in ranks])
        ]
        return sizes[0], sizes[1]

    def _begun(self, parts: list[Tensor], width: int, dtype: torch.dtype) -> Pending:
        message = torch.cat([part.to(dtype).reshape(-1) for part in parts])
        return begin_exchange(message, *self._splits(width), self._group)

    def _ended(self, pending: Pending, blocks: list[Any], width: int, empties: list[Tensor]) -> list[Tensor]:
        received = end_exchange(pending)
        empties.append(received[:0].to(self._q.dtype))
        sizes = [block.count * self._heads * width for block in blocks]
        shapes = [
            (block.rows[1] - block.rows[0], self._heads, block.end - block.start, width) for block in blocks
        ]
        return (
            [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]
            if sizes
            else []
        )


def _joined(pieces: list[tuple[tuple[int, int], int, Tensor, Tensor]], batch: int) -> tuple[Tensor, Tensor]:
    """Join pieces of the output by rows of the batch and positions."""
    by_rows: dict[tuple[int, int], list[tuple[int, Tensor, Tensor]]] = {}
    for rows, start, out, lse in pieces:
        by_rows.setdefault(rows, []).append((start, out, lse))
    outs, lses = [], []
    for rows in sorted(by_rows):
        ordered = sorted(by_rows[rows], key=lambda piece: piece[0])
        outs.append(torch.cat([out for _, out, _ in ordered], 2))
        has_lse = ordered[0][2].ndim > 1
        lses.append(torch.cat([lse for _, _, lse in ordered], 2) if has_lse else ordered[0][2])
    return torch.cat(outs, 0), torch.cat(lses, 0)

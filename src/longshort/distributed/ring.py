"""Attention of global heads whose gathered keys would not fit: keys and values go round in a ring.

Each rank attends from its own queries to one part after the other, and merges the results by lse. In the
backward pass the parts come round again, are recomputed, and their gradients travel with them, so that a rank
never holds more than two parts. Only `attention()` computes: in another part every visible key is earlier, so
queries and keys of one segment meet without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longshort.attention import attention, with_sink_logits
from longshort.distributed.exchange import (
    Pending,
    begin_exchange,
    end_exchange,
    require_first_derivatives,
)
from longshort.distributed.plan import ContextPlan
from longshort.layout import HeadLayout

_ROWS = 256  # queries at a time whose entropy is measured


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: HeadLayout,
    plan: ContextPlan,
    group: dist.ProcessGroup,
    *,
    with_stats: bool,
    sink_logits: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend with heads that are all global.

    Args:
        q, k, v, layout: of these heads alone, this rank's part.
        plan: the plan of the sequence.
        group: the ranks.
        with_stats: measure the entropy and the largest logit, in a round of their own.
        sink_logits: the sink logits of these heads.
        options: the options of `attention` that a ring has: no ALiBi.

    Returns:
        The output; the lse before sink logits; and of this rank's queries by head the largest logit and the
        mean entropy, which have no gradient and are 0 without statistics.
    """
    ring = _Ring(layout, plan, group, {name: x for name, x in options.items() if x is not None})
    out, lse = _RingAttention.apply(q, k, v, ring)  # pyright: ignore[reportGeneralTypeIssues]
    zeros = lse.new_zeros(2, q.shape[1])
    with torch.autocast(q.device.type, enabled=False):  # else scores would be of its dtype
        max_logit, entropy = ring.measure(q.detach(), k.detach(), lse.detach()) if with_stats else zeros
    if sink_logits is not None:
        out = with_sink_logits(out, lse, sink_logits.to(lse.dtype))
    return out.to(q.dtype), lse, max_logit, entropy


@dataclass(frozen=True)
class _Ring:
    """The way of parts round the ranks, and what this rank's queries see of each."""

    layout: HeadLayout
    plan: ContextPlan
    group: dist.ProcessGroup
    options: dict[str, Any]

    def rounds(self, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield each part's number and tensors, this rank's own first."""
        rank, ranks = self.group.rank(), self.group.size()
        for step in range(ranks):
            pending = self.begin_passing(tensors) if step < ranks - 1 else None
            yield (rank - step) % ranks, tensors
            if pending is not None:
                tensors = self.end_passing(pending, tensors)

    def begin_passing(self, tensors: tuple[Tensor, ...]) -> Pending:
        """Begin to send tensors of one dtype to the next rank, and to receive those of the rank before."""
        message = torch.cat([x.reshape(-1) for x in tensors])
        return begin_exchange(message, *self._splits(len(message)), self.group)

    def end_passing(self, pending: Pending, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Wait for tensors of the same shapes."""
        received = end_exchange(pending)
        parts = received.split([x.numel() for x in tensors])
        return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))

    def _splits(self, size: int) -> tuple[list[int], list[int]]:
        rank, ranks = self.group.rank(), self.group.size()
        send, receive = [0] * ranks, [0] * ranks
        send[(rank + 1) % ranks] = receive[(rank - 1) % ranks] = size
        return send, receive

    def visit(self, q: Tensor, k: Tensor, v: Tensor, part: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield, for sets of queries that see keys of a part, their place, output and lse."""
        rank, plan = self.group.rank(), self.plan
        if part > rank:
            return
        everything = (slice(None), slice(None), slice(None))
        if part == rank:
            ids = self._ids(rank)
            own = None if ids is None else ids.to(q.device)
            out, stats = attention(q, k, v, self.layout, segment_ids=own, return_stats=True, **self.options)
            yield everything, out, stats.lse
        elif plan.segment_ids is None:
            yield everything, *self._rectangle(q, k, v)
        else:
            for row, rows, columns in self._meetings(part):
                place = (row, slice(None), rows.to(q.device))
                keys = (row, slice(None), columns.to(q.device))
                out, lse = self._rectangle(q[place][None], k[keys][None], v[keys][None])
                yield place, out[0], lse[0]

    def _rectangle(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from all queries to all keys.

        `attention` takes no more queries than keys. If each key is repeated equally often, the output is the
        same, and the lse larger by the log of their number.
        """
        copies = max(1, -(-q.shape[2] // k.shape[2]))
        if copies > 1:
            k, v = k.repeat(1, 1, copies, 1), v.repeat(1, 1, copies, 1)
        out, stats = attention(q, k, v, self.layout, causal=False, return_stats=True, **self.options)
        return out, stats.lse - math.log(copies)

    def _meetings(self, part: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield row of the batch, queries and keys of each segment that is in this rank's part and in an
        earlier one."""
        own, other = self._ids(self.group.rank()), self._ids(part)
        assert own is not None and other is not None
        for row in range(self.plan.batch):
            held = torch.unique(own[row])
            shared = held[torch.isin(held, other[row]) & (held >= 0)]
            for segment in shared.tolist():
                yield row, (own[row] == segment).nonzero()[:, 0], (other[row] == segment).nonzero()[:, 0]

    def _ids(self, part: int) -> Tensor | None:
        length = self.plan.part
        ids = self.plan.segment_ids
        return None if ids is None else ids[:, part * length : (part + 1) * length]

    @torch.no_grad()
    def measure(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """Return the largest |scale·q·k| of this rank's queries and their mean entropy: (2, heads).

        The entropy of a row is the sum of p·(lse - z), whose terms are not negative.
        """
        rank = self.group.rank()
        scale = self.options.get("scale", q.shape[3] ** -0.5)
        softcap = self.options.get("softcap")
        entropy, largest = torch.zeros_like(lse), lse.new_zeros(q.shape[1])
        group_size = self.layout.group_size
        positions = torch.arange(self.plan.part, device=q.device)
        own = self._ids(rank)
        for part, (keys,) in self.rounds(k):
            if part > rank:
                continue
            keys = keys.to(lse.dtype).repeat_interleave(group_size, 1)
            other = self._ids(part)
            for rows in positions.split(_ROWS):
                logits = (q[:, :, rows].to(lse.dtype) @ keys.mT) * scale
                seen = (
                    positions <= rows[:, None]
                    if part == rank
                    else torch.ones_like(logits[:1, :1], dtype=torch.bool)
                )
                if own is not None and other is not None:
                    mine, theirs = own[:, rows.cpu(), None].to(q.device), other[:, None].to(q.device)
                    seen = (seen & (mine == theirs)[:, None] & (mine >= 0)[:, None]).expand_as(logits)
                logits = logits.masked_fill(~seen, 0)
                largest = torch.maximum(largest, logits.abs().amax((0, 2, 3)))
                scores = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                distance = lse[:, :, rows, None] - scores
                shares = (-distance).exp() * distance
                entropy[:, :, rows] += torch.where(seen & (distance < torch.inf), shares, 0.0).sum(-1)
        sees = lse > -torch.inf
        count = (sees | lse.isnan()).sum((0, 2)).clamp_min(1)
        return torch.stack([largest, torch.where(sees | lse.isnan(), entropy, 0.0).sum((0, 2)) / count])


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
        precise = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros_like(q, dtype=precise)
        lse = out.new_full(q.shape[:3], -torch.inf)
        for part, (keys, values) in ring.rounds(k, v):
            for place, found, found_lse in ring.visit(q, keys, values, part):
                together = torch.logaddexp(lse[place], found_lse)
                kept, added = _share(lse[place], together), _share(found_lse, together)
                out[place] = out[place] * kept + found.to(precise) * added
                lse[place] = together
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        require_first_derivatives()
        ring: _Ring = ctx.ring
        q, k, v, out, lse = ctx.saved_tensors
        grad_out, grad_lse = gradients
        grad_q = torch.zeros_like(q, dtype=out.dtype)
        # the gradients of a part travel with it, a step behind
        travelling = tuple(torch.zeros_like(x, dtype=out.dtype) for x in (k, v))
        for part, (keys, values) in ring.rounds(k, v):
            if part != ring.group.rank():
                travelling = ring.end_passing(ring.begin_passing(travelling), travelling)
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
                found: list[Tensor] = []
                gradients_of_found: list[Tensor] = []
                for place, part_out, part_lse in ring.visit(leaves[0], leaves[1], leaves[2], part):
                    share = _share(part_lse.detach(), lse[place])
                    precise = part_out.detach().to(out.dtype)
                    inner = (grad_out[place] * (precise - out[place])).sum(-1, keepdim=True)
                    inner = torch.where(share > 0, inner, 0.0) if not share.isnan().any() else inner
                    found += [part_out, part_lse]
                    gradients_of_found += [
                        (share * grad_out[place]).to(part_out.dtype),
                        (share * (inner + grad_lse[place][..., None]))[..., 0],
                    ]
            if found:
                parts = torch.autograd.grad(found, leaves, gradients_of_found)
                grad_q += parts[0]
                travelling = tuple(x + y for x, y in zip(travelling, parts[1:], strict=True))
        travelling = ring.end_passing(ring.begin_passing(travelling), travelling)  # home again
        return grad_q.to(q.dtype), *(x.to(k.dtype) for x in travelling), None


def _share(lse: Tensor, together: Tensor) -> Tensor:
    """Return exp(lse - together), 0 where neither sees anything, with a last dimension of 1."""
    return torch.where(
        together > -torch.inf, (lse - together).exp(), torch.where(together.isnan(), together, 0.0)
    )[..., None]

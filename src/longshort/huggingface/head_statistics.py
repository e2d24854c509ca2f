"""Statistics of attention logits by head, computed from queries and keys tile by tile, in linear memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshort.huggingface.visibility import HeadWindows, Visibility

if TYPE_CHECKING:
    from jaxtyping import Float

_MOST_KEYS = 1024  # in a tile
_TILE_SCORES = {"cpu": 2**19}  # few enough to stay in a processor's cache
_TILE_SCORES_ELSEWHERE = 2**24

_LOWEST = -1e4  # exp() of it is 0, and its product with 0 too


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics of one attention call, as `longshort.stability.Reading` defines them.

    Attributes:
        max_logit: the largest |scale·q·k| over visible pairs, 0 if there are none; NaN if a logit is NaN.
        entropy: mean over the rows that see something, nats, before sink logits; 0 if none does.
        row_range: the largest range of a row.
        rows: number of the rows that see something, float64.
    """

    max_logit: Float[Tensor, " heads"]
    entropy: Float[Tensor, " heads"]
    row_range: Float[Tensor, " heads"]
    rows: Float[Tensor, " heads"]


@torch.no_grad()
def measure(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    visible: Visibility,
    scale: float,
    softcap: float | None,
) -> HeadStatistics:
    """Compute the statistics of one call of attention, in fp32 (fp64 for fp64).

    Args:
        q, k: in any floating dtype.
        visible: the visible pairs, and what is added to the scores.
        scale: factor of q·k.
        softcap: the scores are softcap·tanh(scale·q·k/softcap); None: scale·q·k.

    Raises:
        ValueError: the number of query heads is no multiple of that of the KV heads.
    """
    batch, num_heads, q_len, _ = q.shape
    if num_heads % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of the {k.shape[1]} KV heads, got {num_heads}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    sums = q.new_zeros(2, num_heads, dtype=torch.float64)  # of the entropies of rows, and of rows
    extremes = q.new_zeros(2, num_heads, dtype=dtype)  # max_logit and row_range
    with torch.autocast(q.device.type, enabled=False):  # q and k have the attention's precision already
        for group in visible.groups:
            heads = list(group.heads)
            for rows, entries in _row_tiles(batch, q_len, len(heads), group.window, q.device):
                part = _Rows(q[entries][:, heads, rows].to(dtype) * scale, k[entries], num_heads, group)
                for keys in visible.key_ranges(rows, group.window, _MOST_KEYS):
                    part.add(visible, rows, keys, entries, softcap)
                sizes, ranges, entropies, seen = part.result()
                found = torch.stack([sizes.amax((0, 2)), ranges.amax((0, 2))])
                extremes[:, heads] = torch.maximum(extremes[:, heads], found)
                totals = torch.stack(
                    [entropies.sum((0, 2), dtype=sums.dtype), seen.sum((0, 2)).to(sums.dtype)]
                )
                sums[:, heads] += totals
    return HeadStatistics(extremes[0], (sums[0] / sums[1].clamp_min(1)).to(dtype), extremes[1], sums[1])


def _row_tiles(
    batch: int, q_len: int, heads: int, window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of queries, and of entries of the batch, whose tiles are of bounded size."""
    budget = _TILE_SCORES.get(device.type, _TILE_SCORES_ELSEWHERE) // (heads * _MOST_KEYS)
    rows = 128 if window is None else min(max(window, 64), 128)
    rows = max(1, min(rows, q_len, max(budget, 16)))
    entries = max(1, min(batch, budget // rows))
    for first in range(0, q_len, rows):
        for start in range(0, batch, entries):
            yield slice(first, min(first + rows, q_len)), slice(start, min(start + entries, batch))


class _Rows:
    """The rows of a tile of queries while their keys come range by range.

    The largest and smallest logit of each row; and of its scores z the largest m, l = Σ exp(z - m) and
    s = Σ exp(z - m)·(z - m), from which its entropy is log l - s/l, without cancellation at large logits.
    """

    def __init__(self, q: Tensor, k: Tensor, num_heads: int, group: HeadWindows) -> None:
        """Take scaled queries (batch, heads of the group, rows, head_dim) and all KV heads."""
        batch, heads, rows, head_dim = q.shape
        group_size = num_heads // k.shape[1]
        kv_heads = [head // group_size for head in group.heads[::group_size]]
        self._k = k if len(kv_heads) == k.shape[1] else k[:, kv_heads]
        self._q = q.reshape(batch, len(kv_heads), group_size * rows, head_dim)
        self._group = group
        self._shape = (batch, heads, rows)
        self._largest = q.new_full(self._shape, -math.inf)
        self._smallest = q.new_full(self._shape, math.inf)
        self._max = q.new_full(self._shape, -math.inf)
        self._sum, self._weighted = q.new_zeros(self._shape), q.new_zeros(self._shape)

    def add(
        self, visible: Visibility, rows: slice, keys: slice, entries: slice, softcap: float | None
    ) -> None:
        """Take in a range of keys."""
        logits = (self._q @ self._k[:, :, keys].to(self._q.dtype).mT).view(*self._shape, -1)
        hidden = visible.hidden(rows, keys, self._group, entries)
        if hidden is not None:
            logits.masked_fill_(hidden, math.inf)
        torch.minimum(self._smallest, logits.amin(-1), out=self._smallest)
        if hidden is not None:
            logits.masked_fill_(hidden, -math.inf)
        highest = logits.amax(-1)
        torch.maximum(self._largest, highest, out=self._largest)
        bias = visible.bias(rows, keys, self._group, entries)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            logits += bias
        if softcap is not None or bias is not None:
            if hidden is not None:
                logits.masked_fill_(hidden, -math.inf)
            highest = logits.amax(-1)
        self._add_scores(logits, highest)

    def _add_scores(self, scores: Tensor, highest: Tensor) -> None:
        before, now = self._max, torch.maximum(self._max, highest)
        origin = now.masked_fill(now == -math.inf, 0.0)
        distances = scores.sub_(origin[..., None])
        weights = distances.exp()
        distances.clamp_(min=_LOWEST)
        shift = (before - origin).masked_fill(before == -math.inf, 0.0)  # nothing was summed then
        factor = shift.exp()
        self._weighted = factor * (self._weighted + self._sum * shift)
        self._sum = factor * self._sum + weights.sum(-1)
        self._weighted += weights.mul_(distances).sum(-1)
        self._max = now

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return by row the size of the largest logit, the range, the entropy, and whether it sees
        anything."""
        seen = ~(self._largest < self._smallest)  # NaN is seen
        sizes = torch.maximum(self._largest.abs(), self._smallest.abs())
        entropy = self._sum.log() - self._weighted / self._sum
        ranges = self._largest - self._smallest
        sizes, ranges, entropy = (x.masked_fill(~seen, 0.0) for x in (sizes, ranges, entropy))
        return sizes, ranges, entropy, seen

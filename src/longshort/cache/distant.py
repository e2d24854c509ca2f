"""Attention to sinks at given positions and to later keys, in plain PyTorch: for rings whose sinks have moved
away from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshort.backends.visible_sums import visible_product

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_QUERIES = 256  # at a time, so that no scores of all queries exist


def attend_with_distant_sinks(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    sink_positions: Int[Tensor, "batch sinks"],
    begin: int,
    window: int,
    segment_ids: Int[Tensor, "batch kv_len"] | None,
    scale: float,
    softcap: float | None,
    alibi_slopes: Float[Tensor, " heads"] | None,
    round_probabilities: bool,
) -> tuple[Float[Tensor, "batch heads q_len head_dim"], Float[Tensor, "batch heads q_len"]]:
    """Causal attention of local heads as `longshort.attention` defines it, but that some keys are missing
    between the first ones and the rest.

    Args:
        q: the queries of the last q_len positions.
        k, v: first the sinks, then those of positions `begin`, begin + 1 and so on, sinks or not.
        sink_positions: positions of the sinks, at most the last query's; -1 for none.
        segment_ids: the segment ids of all positions.
        The rest is as of `AttentionCall`.

    Returns:
        out, and the natural log of the sum of exp(score).
    """
    sinks = sink_positions.shape[1]
    near = k.shape[2] - sinks
    group_size, q_len = q.shape[1] // k.shape[1], q.shape[2]
    score_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (x.to(score_dtype).repeat_interleave(group_size, 1) for x in (k, v))
    positions = torch.arange(begin, begin + near, device=q.device)
    key_positions = torch.cat([sink_positions, positions.expand(len(q), -1)], dim=1)
    of_keys = None if segment_ids is None else segment_ids.gather(1, key_positions.clamp_min(0))
    is_sink = torch.arange(sinks + near, device=q.device) < sinks
    comes_first = (positions[:, None] == sink_positions[:, None]).any(-1)  # the same key, among the sinks
    is_shown = torch.cat([sink_positions >= 0, ~comes_first], dim=1)
    outs, lses = [], []
    for start in range(0, q_len, _QUERIES):
        end = min(start + _QUERIES, q_len)
        first, last = (sinks + near - q_len + i for i in (start, end))  # the queries' own keys
        nearest = max(sinks, first - window + 1)
        ranges = ((0, sinks), (nearest, last))
        index = torch.cat([torch.arange(*ends, device=q.device) for ends in ranges])
        at = positions[first - sinks : last - sinks]
        distance = at[:, None] - key_positions[:, None, index]
        seen = (distance >= 0) & is_shown[:, None, index] & ((distance < window) | is_sink[index])
        if of_keys is not None and segment_ids is not None:
            of_queries = segment_ids[:, at, None]
            seen = seen & (of_queries == of_keys[:, None, index]) & (of_queries >= 0)
        scores = scale * (q[:, :, start:end].to(score_dtype) @ keys[:, :, index].mT)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(score_dtype)[:, None, None] * distance[:, None]
        seen = seen[:, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        sees_nothing = ~seen.any(-1, keepdim=True)
        row_max = scores.amax(-1, keepdim=True).masked_fill(sees_nothing, 0.0)
        weights = torch.exp(scores - row_max)
        row_sum = weights.sum(-1, keepdim=True)
        lse = row_max + row_sum.log()  # -inf where nothing is seen
        if round_probabilities:
            weights = weights.to(v.dtype).to(score_dtype)
        out = visible_product(weights, values[:, :, index], seen) / row_sum.masked_fill(sees_nothing, 1.0)
        outs.append(out.to(q.dtype))
        lses.append(lse.squeeze(-1))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

"""Attention to keys at given positions, in plain PyTorch: for rings whose sinks have moved away from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshort.backends.visible_sums import visible_product

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_QUERIES = 256  # at a time, so that no scores of all queries exist


def attend_with_distant_sinks(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    sink_positions: Int[Tensor, "batch distant"],
    begin: int,
    is_sink: Bool[Tensor, "batch near"],
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
        q: of the last q_len positions.
        k, v: first the distant sinks, then those of positions `begin`, begin + 1 and so on.
        sink_positions: positions of the distant sinks; -1 for none.
        is_sink: marks those of the other keys that all later queries of the segment see.
        segment_ids: of all positions.
        The rest is as of `AttentionCall`.

    Returns:
        out, and the natural log of the sum of exp(score).
    """
    distant, near = sink_positions.shape[1], is_sink.shape[1]
    group_size, q_len = q.shape[1] // k.shape[1], q.shape[2]
    score_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (x.to(score_dtype).repeat_interleave(group_size, 1) for x in (k, v))
    positions = torch.arange(begin, begin + near, device=q.device)
    key_positions = torch.cat([sink_positions, positions.expand(len(q), -1)], dim=1)
    of_keys = None if segment_ids is None else segment_ids.gather(1, key_positions.clamp_min(0))
    is_sink = torch.cat([sink_positions >= 0, is_sink], dim=1)
    flagged = is_sink.any(0).nonzero()
    far = max(
        distant, int(flagged.max()) + 1 if len(flagged) else 0
    )  # all sinks are among the first keys up to here
    outs, lses = [], []
    for start in range(0, q_len, _QUERIES):
        end = min(start + _QUERIES, q_len)
        first, last = (distant + near - q_len + i for i in (start, end))  # the queries' own keys
        nearest = max(far, first - window + 1)
        index = torch.cat([torch.arange(far), torch.arange(nearest, max(nearest, last))]).to(q.device)
        at = positions[first - distant : last - distant]
        distance = at[:, None] - key_positions[:, None, index]
        seen = (distance >= 0) & (key_positions >= 0)[:, None, index]
        seen = seen & ((distance < window) | is_sink[:, None, index])
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

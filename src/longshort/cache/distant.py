"""Attention to keys at given positions, in plain PyTorch: for rings whose sinks have moved away from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_QUERIES = 256  # at a time, so that no scores of all queries exist


def attend_to_positions(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    query_positions: Int[Tensor, " q_len"],
    key_positions: Int[Tensor, "batch keys"],
    is_sink: Bool[Tensor, "batch keys"],
    window: int,
    segment_ids: Int[Tensor, "batch kv_len"] | None,
    scale: float,
    softcap: float | None,
    alibi_slopes: Float[Tensor, " heads"] | None,
    round_probabilities: bool,
) -> tuple[Float[Tensor, "batch heads q_len head_dim"], Float[Tensor, "batch heads q_len"]]:
    """Causal attention of local heads as `longshort.attention` defines it, but for where the keys stand.

    Args:
        key_positions: -1 where there is no key.
        is_sink: whether all later queries of its segment see the key.
        segment_ids: of all positions.
        The rest is as of `AttentionCall`.

    Returns:
        out, and the natural log of the sum of exp(score).
    """
    group_size = q.shape[1] // k.shape[1]
    score_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (x.to(score_dtype).repeat_interleave(group_size, 1) for x in (k, v))
    of_keys = None if segment_ids is None else segment_ids.gather(1, key_positions.clamp_min(0))
    outs, lses = [], []
    for queries, positions in zip(q.split(_QUERIES, 2), query_positions.split(_QUERIES), strict=True):
        distance = positions[:, None] - key_positions[:, None, :]
        seen = (
            (distance >= 0) & (key_positions >= 0)[:, None, :] & ((distance < window) | is_sink[:, None, :])
        )
        if of_keys is not None and segment_ids is not None:
            of_queries = segment_ids[:, positions, None]
            seen = seen & (of_queries == of_keys[:, None, :]) & (of_queries >= 0)
        scores = scale * (queries.to(score_dtype) @ keys.mT)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(score_dtype)[:, None, None] * distance[:, None]
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        row_max = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = torch.exp(scores - row_max)
        row_sum = weights.sum(-1, keepdim=True)
        if round_probabilities:
            weights = weights.to(v.dtype).to(score_dtype)
        out = weights @ values / row_sum.masked_fill(lse == -torch.inf, 1.0)
        outs.append(out.to(q.dtype))
        lses.append(lse.squeeze(-1))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

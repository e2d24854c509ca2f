"""The inputs of a model's forward pass: checks, and defaults for those that are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from longshort.attention import require_tensor
from longshort.huggingface import segment_ids_from
from longshort.key_values import is_recording, positions_after


def segments_and_positions(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    past: int | Tensor,
    tokens: Tensor,
    max_length: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return the segment ids of all keys, None if nothing is padded or packed, and the positions of the new
    tokens, which are ids or embeddings.

    Masks may go on to the cache's max_length. If only the device knows how many tokens are past, they must,
    and so must segment ids, those that are returned too.
    """
    batch, q_len = tokens.shape[:2]
    device = tokens.device
    if isinstance(past, Tensor):
        assert max_length is not None
        kv_len, past = max_length, past.clamp(max=max_length - 1)
    else:
        kv_len = past + q_len
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] == max_length:
            attention_mask = attention_mask[:, :kv_len]
    told_by_positions = None if segment_ids is not None else position_ids
    from_mask = segment_ids_from(attention_mask, told_by_positions, batch, q_len, kv_len, device)
    if segment_ids is None:
        segment_ids = from_mask
    else:
        require_tensor("segment_ids", segment_ids)
        if tuple(segment_ids.shape) != (batch, kv_len):
            raise ValueError(
                f"segment_ids must be (batch, kv_len) = {(batch, kv_len)}, got {tuple(segment_ids.shape)}"
            )
        if from_mask is not None:
            segment_ids = segment_ids.masked_fill(from_mask < 0, -1)
    if position_ids is None and from_mask is not None:
        ranks = ((from_mask >= 0).cumsum(-1) - 1).clamp_min(0)
        position_ids = ranks.index_select(1, past) if isinstance(past, Tensor) else ranks[:, past:]
    elif position_ids is None:
        position_ids = positions_after(past, q_len, device)
    return segment_ids, position_ids


def kept(hidden_states: Tensor, logits_to_keep: Any) -> Tensor:
    """Select the hidden states that get logits: the last n, all for 0, or those at a 1-D tensor's positions.

    Raises:
        ValueError: logits_to_keep is neither.
    """
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must be an integer >= 0 or a 1-D tensor, got {logits_to_keep!r}")
    return hidden_states[:, -logits_to_keep:]


def check_labels(name: str, labels: Any, hidden_states: Tensor) -> None:
    """Raise a TypeError or ValueError that names the argument unless labels are None or (batch, sequence) of
    int64."""
    if labels is None:
        return
    require_tensor(name, labels)
    if labels.shape != hidden_states.shape[:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"{name} must be (batch, sequence) = {tuple(hidden_states.shape[:2])} of int64, "
            f"got shape {tuple(labels.shape)} of {labels.dtype}"
        )


def check_range(name: str, ids: Tensor, limit_name: str, limit: int) -> None:
    """Raise a ValueError for ids outside 0 ... limit - 1, except where values cannot be read: in a forward
    pass that is compiled or captured in a CUDA graph, or a transform of torch.func."""
    if is_recording() or is_functorch_wrapped_tensor(ids) or ids.numel() == 0:
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= limit:
        raise ValueError(
            f"{name} must be at least 0 and below {limit_name} = {limit}, got {low if low < 0 else high}"
        )

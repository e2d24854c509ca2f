"""Segment ids of `longshort.attention` from the attention masks and position ids of Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort.attention import require_tensor
from longshort.layers import require_position_ids

if TYPE_CHECKING:
    from jaxtyping import Int


def segment_ids_from(
    attention_mask: Int[Tensor, "batch kv_len"] | None,
    position_ids: Int[Tensor, "batch q_len"] | None,
    batch: int,
    q_len: int,
    kv_len: int,
    device: torch.device,
) -> Int[Tensor, "batch kv_len"] | None:
    """Return the segment ids of the keys, or None where nothing is padded and nothing is packed.

    Masked keys are padding (-1). Without cached keys, a position that falls starts a new segment, which is
    how packed sequences arrive: one that is 0, or smaller than that of the token before it. Positions that
    jump ahead (as in position-skip training), step by 2 or repeat (but for 0) stay in their sequence, since
    all of these are in use for tokens that see each other; transformers' own masks would cut there. Masked
    tokens are passed over. With cached keys only the mask counts.

    In eager mode values are read, so that a mask of ones or ordinary positions cost attention nothing. Under
    `torch.compile` they cannot be: whatever is given becomes segment ids.

    Args:
        attention_mask: 1 (True) for tokens, 0 (False) for padding, also for cached keys; any dtype.
        position_ids: integers; (1, q_len) holds for all sequences.
        batch, q_len, kv_len: sizes of the attention call, q_len <= kv_len.
        device: of the result.

    Returns:
        int64, or None.

    Raises:
        TypeError: attention_mask or position_ids is no tensor.
        ValueError: a mask of another shape than (batch, kv_len), such as a 4-D one, or of other values than
            0 and 1; position ids of another shape or device, or no integers.
    """
    visible = None if attention_mask is None else _visible(attention_mask, batch, kv_len, device)
    if position_ids is not None:
        require_position_ids(position_ids, batch, q_len, device)
    starts = None
    if position_ids is not None and q_len == kv_len:
        starts = _segment_starts(position_ids, visible)
    if starts is None:
        return None if visible is None else visible.to(torch.int64) - 1
    segment_ids = starts.cumsum(-1).expand(batch, kv_len)
    return segment_ids if visible is None else segment_ids.masked_fill(~visible, -1)


def _visible(attention_mask: Any, batch: int, kv_len: int, device: torch.device) -> Tensor | None:
    """The mask as bools, None where it hides nothing."""
    require_tensor("attention_mask", attention_mask)
    if tuple(attention_mask.shape) != (batch, kv_len):
        hint = (
            "; a mask per query and key cannot be used: pass the 2-D mask of tokens, or segment_ids"
            if attention_mask.ndim > 2
            else f", one entry for each of the {kv_len} keys, cached ones included"
        )
        raise ValueError(
            f"attention_mask must be (batch, kv_len) = {(batch, kv_len)}, "
            f"got shape {tuple(attention_mask.shape)}{hint}"
        )
    visible = attention_mask.to(device) != 0
    if torch.compiler.is_compiling():
        return visible
    is_binary = (visible == attention_mask.to(device)).all()
    hides_nothing, is_binary = torch.stack([visible.all(), is_binary]).tolist()  # one transfer, not two
    if not is_binary:
        raise ValueError(
            f"attention_mask must hold 0 and 1 only, got values such as {_other_value(attention_mask)}"
        )
    return None if hides_nothing else visible


def _other_value(attention_mask: Tensor) -> float:
    return attention_mask[(attention_mask != 0) & (attention_mask != 1)][0].item()


def _segment_starts(position_ids: Tensor, visible: Tensor | None) -> Tensor | None:
    """Mark the tokens whose position is lower than that of the visible token before; None if none is."""
    before = position_ids[:, :-1]
    if visible is not None:
        slots = torch.arange(visible.shape[1], device=visible.device)
        last_visible = torch.where(visible, slots, 0).cummax(-1).values[:, :-1]
        position_ids = position_ids.expand(visible.shape)
        before = position_ids.gather(1, last_visible)
    falls = (position_ids[:, 1:] < before) | (position_ids[:, 1:] == 0)
    if visible is not None:
        follows_a_visible_one = visible.cumsum(-1)[:, :-1] > 0
        falls = falls & visible[:, 1:] & follows_a_visible_one
    if not torch.compiler.is_compiling() and not bool(falls.any()):
        return None
    return F.pad(falls, (1, 0))

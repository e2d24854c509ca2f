"""Segment ids of `longshort.attention` from the attention masks and position ids of Hugging Face."""

from __future__ import annotations

import operator
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort.attention import require_tensor
from longshort.key_values import is_recording
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

    Masked keys are padding (-1). Without cached keys, a position that is 0, or smaller than that of the token
    before it, starts a new segment, as in packed sequences. Positions that jump ahead (as in position-skip
    training), step by 2 or repeat (other than 0) stay in their sequence, since all of these are in use for
    tokens that see each other; transformers' own masks would cut there. Masked tokens are skipped, and
    a position that continues those of padding starts nothing: `generate()` counts so after padding on the
    right. With cached keys only the mask counts.

    In eager mode values are read, so that a mask of ones or ordinary positions cost attention nothing. Under
    `torch.compile` they cannot be read, so any mask and positions become segment ids.

    Args:
        attention_mask: 1 (True) for tokens, 0 (False) for padding, also for cached keys; any dtype.
        position_ids: integers; (1, q_len) holds for all sequences.
        batch: sequences of the attention call.
        q_len: its queries, <= kv_len.
        kv_len: its keys.
        device: the device of the result.

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


def segment_ids_of_call(
    attention_mask: Any,
    position_ids: Tensor | None,
    bounds: Tensor | None,
    sizes: tuple[int, int, int],
    device: torch.device,
) -> Int[Tensor, "batch kv_len"] | None:
    """Return the segment ids of the keys in a call of the attention implementation "longshort".

    Args:
        attention_mask: int64 segment ids, (batch or 1, 1, 1, kv_len), or None.
        position_ids: without cached keys, positions that fall begin a new segment.
        bounds: the bounds of packed sequences in a batch of 1, (sequences + 1,), instead of positions.
        sizes: batch, q_len and kv_len.
        device: the device of the result.

    Returns:
        int64, -1 for padding; None where nothing is padded and nothing is packed.

    Raises:
        ValueError: the mask is another one, or bounds come with more sequences or with cached keys.
    """
    batch, q_len, kv_len = sizes
    ids = None
    if attention_mask is not None:
        is_ours = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int64
        if not is_ours or attention_mask.shape[1:] != (1, 1, kv_len):
            raise ValueError(
                f"attention_mask must be the mask of tokens, (batch, kv_len = {kv_len}); a mask per query "
                f"and key is not supported, got {_described(attention_mask)}"
            )
        ids = attention_mask[:, 0, 0].expand(batch, kv_len)
    if bounds is not None:
        if batch != 1 or q_len != kv_len:
            raise ValueError(
                "cu_seq_lens_q must come with a batch of 1 and without cached keys, got a batch of "
                f"{batch}, {q_len} queries and {kv_len} keys"
            )
        packed = segment_ids_between(bounds, batch, kv_len, device)
        return packed if ids is None else packed.masked_fill(ids < 0, -1)
    if position_ids is None or position_ids.ndim != 2 or q_len != kv_len or kv_len == 1:
        return ids
    packed = _packed_by(position_ids, attention_mask, batch, kv_len)
    if ids is None or packed is None:
        return ids if packed is None else packed
    return torch.where(ids < 0, -1, ids * kv_len + packed)  # alike in both


def segment_ids_between(
    bounds: Tensor, batch: int, kv_len: int, device: torch.device
) -> Int[Tensor, "batch kv_len"]:
    """Return the segment ids of sequences that follow each other across all rows of the batch.

    Args:
        bounds: where sequences begin and end, (sequences + 1,).
        batch, kv_len: sizes of the result.
        device: the device of the result.
    """
    at = torch.arange(batch * kv_len, device=device)
    ends = bounds.to(device, torch.int64)[1:].contiguous()
    return torch.searchsorted(ends, at, right=True).view(batch, kv_len)


class _Packed(NamedTuple):
    """Segment ids, and the tensors that they were computed from."""

    references: list[weakref.ref[Tensor]]
    versions: list[int]
    batch: int
    ids: Tensor | None

    def is_of(self, given: list[Tensor], batch: int) -> bool:
        held = [reference() for reference in self.references]
        return batch == self.batch and len(held) == len(given) and all(map(operator.is_, held, given))


_last_packed: ContextVar[_Packed | None] = ContextVar("last packed", default=None)


def _packed_by(position_ids: Tensor, attention_mask: Tensor | None, batch: int, kv_len: int) -> Tensor | None:
    """Return the segment ids of positions that restart, or None. They are computed once per forward pass,
    whose layers all have the same positions and mask."""
    given = [position_ids] if attention_mask is None else [position_ids, attention_mask]
    versions: list[int] = []
    is_new = is_recording() or any(x.is_inference() for x in given)  # without a version
    if not is_new:
        last, versions = _last_packed.get(), [x._version for x in given]
        if last is not None and last.versions == versions and last.is_of(given, batch):
            return last.ids
    visible = None if attention_mask is None else (attention_mask[:, 0, 0] >= 0).expand(batch, kv_len)
    ids = segment_ids_from(visible, position_ids, batch, kv_len, kv_len, position_ids.device)
    if not is_new:
        _last_packed.set(_Packed([weakref.ref(x) for x in given], versions, batch, ids))
    return ids


def _described(value: Any) -> str:
    return (
        f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )


def _visible(attention_mask: Any, batch: int, kv_len: int, device: torch.device) -> Tensor | None:
    """Return the mask as bools, None where it hides nothing."""
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
    if is_recording():
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
    """Mark the tokens whose position is 0, or lower than those of the token before and of the visible token
    before; None if none is."""
    last = before = position_ids[:, :-1]
    if visible is not None:
        slots = torch.arange(visible.shape[1], device=visible.device)
        last_visible = torch.where(visible, slots, 0).cummax(-1).values[:, :-1]
        position_ids = position_ids.expand(visible.shape)
        before = position_ids.gather(1, last_visible)
    positions = position_ids[:, 1:]
    falls = ((positions < before) & (positions < last)) | (positions == 0)
    if visible is not None:
        follows_a_visible_one = visible.cumsum(-1)[:, :-1] > 0
        falls = falls & visible[:, 1:] & follows_a_visible_one
    if not is_recording() and not bool(falls.any()):
        return None
    return F.pad(falls, (1, 0))

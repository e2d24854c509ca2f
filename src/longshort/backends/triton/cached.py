"""Attention from a new token to a cache: launches the decoding kernels, and registers them for compilers."""

from __future__ import annotations

from collections.abc import Sequence  # torch reads the annotations of operators

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.triton import decode
from longshort.backends.triton.launching import (
    launch,
    padded,
    precision,
    tiles_for,
    with_positive_scale,
)

COLUMNS = decode.COLUMNS.value
_SPLITS = 64
_ALIGNMENT = 16
_UNLIMITED = 1 << 62


def describe_stores(
    stores: Sequence[Tensor],
    sinks: Sequence[Tensor],
    rings: Sequence[int],
    lost: Sequence[int],
    group_of: Sequence[int],
    max_length: int | None,
) -> Tensor:
    """Describe the stores of a cache to `attend_cached`, in a table on the CPU; valid while they live.

    Args:
        stores: keys and values of each group of heads, (2, batch, kv_heads, slots, head_dim), contiguous.
            Position p is in slot p % ring.
        sinks: (2, batch, kv_heads, n, head_dim), the first n sinks of each sequence, as far as they have left
            the ring, contiguous.
        rings: sizes of the rings, 0 for a store that keeps everything.
        lost: the numbers of first positions that are gone, whatever the length.
        group_of: the group of each key/value head.
        max_length: the most tokens of the cache; None: as many as there are slots for.

    Returns:
        (kv_heads, columns) of int64.
    """
    table, seen = [], dict.fromkeys(group_of, 0)
    for group in group_of:
        store, sink, index = stores[group], sinks[group], seen[group]
        seen[group] += 1
        k, v = (part.data_ptr() + part.stride(1) * index * part.element_size() for part in store)
        sink_k, sink_v = (part.data_ptr() + part.stride(1) * index * part.element_size() for part in sink)
        table.append([
            k, v, store.stride(1), store.shape[3], rings[group], lost[group],
            sink_k, sink_v, sink.stride(1), sink.shape[3], _UNLIMITED if max_length is None else max_length,
        ])  # fmt: skip
    return torch.tensor(table)


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    length: Tensor,
    slots: int,
    sink_positions: Tensor | None,
    windows: Tensor,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Append the key and value of a new token to those of a cache and attend to them all. The caller has
    checked everything; there are no gradients.

    The kernels find the stores by `table`, and the number of tokens in `length`, which they increase: so the
    launches can be recorded once and run for each token.

    Args:
        q, k, v: of the new token; k and v in the dtype of the stores.
        table: the result of `describe_stores`, on the device.
        length: (1,) of int64, tokens before the new one. If the cache is full the output is NaN.
        slots: the largest number of slots in use of a store.
        sink_positions: (batch, n) of int64, of the sinks of each sequence, -1 for none; None: no sinks.
        windows: the window of each key/value head, int32.
        scale, softcap, alibi_slopes, segment_ids: as in `AttentionCall`; the slopes in fp32. There may be
            more segment ids than tokens, of any value.
        with_lse: return the lse too, and the output in fp32.

    Returns:
        out, and the natural log of the sum of exp(score), which is empty without `with_lse`.
    """
    q, scale = with_positive_scale(q, scale)
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    tiles = tiles_for("decode", q)
    splits = 1 + max(1, min(_SPLITS - 1, -(-slots // decode.SMALLEST_SPLIT.value)))
    parts = q.new_empty((splits, batch, heads, head_dim), dtype=torch.float32)
    part_max, part_sum = q.new_empty((2, splits, batch, heads), dtype=torch.float32).unbind()
    out = q.new_empty(q.shape, dtype=torch.float32 if with_lse else q.dtype)
    lse = q.new_empty((batch, heads, 1) if with_lse else (0,), dtype=torch.float32)
    slopes = part_max if alibi_slopes is None else alibi_slopes.contiguous()
    ids = table if segment_ids is None else segment_ids.contiguous()
    positions = table if sink_positions is None else sink_positions
    q_at, k_at, v_at = ((x.stride(0), x.stride(1), x.stride(3)) for x in (q, k, v))
    launch(
        decode.decode_kernel, (batch * kv_heads, splits), tiles,
        q, k, v, table, length, parts, part_max, part_sum, windows, slopes, ids, positions,
        *q_at, *k_at, *v_at, ids.stride(0), positions.stride(0),
        0 if sink_positions is None else sink_positions.shape[1], scale, softcap or 0.0, heads, kv_heads,
        batch, D=head_dim, BLOCK_D=padded(head_dim), ROWS=padded(heads // kv_heads), KEYS=tiles.keys,
        GROUP=heads // kv_heads, SOFTCAP=softcap is not None, ALIBI=alibi_slopes is not None,
        SEGMENTS=segment_ids is not None, SINKS=sink_positions is not None,
        ALIGNED=head_dim * k.element_size() % _ALIGNMENT == 0, PRECISION=precision(q),
    )  # fmt: skip
    launch(
        decode.merge_kernel, (batch * heads,), tiles_for("merge", q),
        parts, part_max, part_sum, out, lse, length, out.stride(0), out.stride(1), out.stride(3), splits,
        heads, batch * heads, D=head_dim, BLOCK_D=padded(head_dim), SPLITS=_SPLITS, HAS_LSE=with_lse,
    )  # fmt: skip
    return out, lse


def _fake_attend_cached(q, k, v, table, length, slots, sink_positions, windows, scale, softcap, alibi_slopes,
                        segment_ids, with_lse):  # fmt: skip
    out = q.new_empty(tuple(q.shape), dtype=torch.float32 if with_lse else q.dtype)
    return out, q.new_empty(tuple(q.shape[:3]) if with_lse else (0,), dtype=torch.float32)


# `table` stands for the stores, so that compilers keep the order of what writes to them
operators.define(
    "triton_attend_cached",
    "CompositeExplicitAutograd",
    attend_cached,
    _fake_attend_cached,
    mutates_args=("table", "length"),
)

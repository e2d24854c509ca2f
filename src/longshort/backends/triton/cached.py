"""Attention from a new token to a cache: launches the decoding kernels, and registers them for compilers."""

from __future__ import annotations

from collections.abc import Sequence  # torch reads the annotations of operators

import torch
from torch import Tensor

from longshort.backends import operators
from longshort.backends.triton import decode
from longshort.backends.triton.launching import interpreted, launch, padded, precision, table_of
from longshort.backends.triton.tiles import Tiles, tiles_of

_SPLITS = 64
_SMALLEST_SPLIT = 128


def describe_stores(
    stores: Sequence[Tensor],
    sinks: Sequence[Tensor],
    sink_positions: Sequence[Tensor],
    rings: Sequence[int],
    lost: Sequence[int],
    group_of: Sequence[int],
) -> Tensor:
    """Describe the stores of a cache to `attend_cached`, in a table on their device; valid while they live.

    Args:
        stores: of each group of heads, (2, batch, kv_heads, slots, head_dim), keys and values, contiguous.
            Position p is in slot p % ring.
        sinks: (2, batch, kv_heads, n, head_dim), the sinks that have left the ring, contiguous.
        sink_positions: (batch, n) of int64: the positions of the sinks, -1 for none.
        rings: sizes of the rings, 0 for a store that keeps everything.
        lost: the numbers of first positions that are gone, whatever the length.
        group_of: the group of each key/value head.

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
            sink_k, sink_v, sink.stride(1), sink.shape[3], sink_positions[group].data_ptr(),
        ])  # fmt: skip
    return torch.tensor(table).to(stores[0].device)


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    slots: int,
    sink_positions: Tensor | None,
    windows: Tensor,
    length: int,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Append the key and value of a new token to those of a cache and attend to them all. The caller has
    checked everything; there are no gradients.

    Args:
        q, k, v: of the new token; k and v in the dtype of the stores.
        table: the result of `describe_stores`, with a free slot for the token.
        slots: the largest number of slots in use of a store.
        sink_positions: (batch, n) of int64, of the sinks of each sequence, -1 for none; None: no sinks.
        windows: of each key/value head, int32.
        length: positions before the new one.
        scale, softcap, alibi_slopes, segment_ids: as in `AttentionCall`; the slopes in fp32.
        with_lse: return the lse too.

    Returns:
        out, and the natural log of the sum of exp(score), or None.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    tiles = Tiles(16, 16, 1, 1) if interpreted() else tiles_of("decode", head_dim, q.dtype)
    share = max(_SMALLEST_SPLIT, -(-slots // (_SPLITS - 1)))
    split = -(-share // tiles.keys) * tiles.keys
    splits = 1 + -(-slots // split)
    parts = q.new_empty((splits, batch, heads, head_dim), dtype=torch.float32)
    part_max, part_sum = q.new_empty((2, splits, batch, heads), dtype=torch.float32).unbind()
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, 1), dtype=torch.float32) if with_lse else None
    slopes = part_max if alibi_slopes is None else alibi_slopes.contiguous()
    ids = table if segment_ids is None else segment_ids.contiguous()
    positions = table if sink_positions is None else sink_positions
    q_at, k_at, v_at = ((x.stride(0), x.stride(1), x.stride(3)) for x in (q, k, v))
    launch(
        decode.decode_kernel, (batch * kv_heads, splits), tiles,
        q, k, v, table, parts, part_max, part_sum, windows, slopes, ids, positions,
        *q_at, *k_at, *v_at, ids.stride(0), positions.stride(0), length,
        0 if sink_positions is None else sink_positions.shape[1], split, scale, softcap or 0.0, heads,
        kv_heads, batch, D=head_dim, BLOCK_D=padded(head_dim), ROWS=padded(heads // kv_heads),
        KEYS=tiles.keys, GROUP=heads // kv_heads, SOFTCAP=softcap is not None, ALIBI=alibi_slopes is not None,
        SEGMENTS=segment_ids is not None, SINKS=sink_positions is not None, PRECISION=precision(q),
    )  # fmt: skip
    launch(
        decode.merge_kernel, (batch * heads,), Tiles(0, 0, 4, 1),
        parts, part_max, part_sum, out, part_max if lse is None else lse,
        out.stride(0), out.stride(1), out.stride(3), splits, heads, batch * heads,
        D=head_dim, BLOCK_D=padded(head_dim), SPLITS=_SPLITS, HAS_LSE=with_lse,
    )  # fmt: skip
    return out, lse


def _attend_cached_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stores: Sequence[Tensor],
    sinks: Sequence[Tensor],
    sink_positions: Sequence[Tensor],
    rings: Sequence[int],
    lost: Sequence[int],
    group_of: Sequence[int],
    all_sink_positions: Tensor | None,
    windows: Sequence[int],
    length: int,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    table = describe_stores(stores, sinks, sink_positions, rings, lost, group_of)
    out, lse = attend_cached(
        q, k, v, table, max(min(store.shape[3], length) for store in stores), all_sink_positions,
        table_of(tuple(windows), q.device), length, scale, softcap, alibi_slopes, segment_ids, with_lse,
    )  # fmt: skip
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _fake_attend_cached(q, k, v, stores, sinks, sink_positions, rings, lost, group_of, all_sink_positions,
                        windows, length, scale, softcap, alibi_slopes, segment_ids, with_lse):  # fmt: skip
    return torch.empty_like(q), q.new_empty(tuple(q.shape[:3]) if with_lse else (0,), dtype=torch.float32)


operators.define(
    "triton_attend_cached",
    "CompositeExplicitAutograd",
    _attend_cached_operator,
    _fake_attend_cached,
    mutates_args=("stores",),
)

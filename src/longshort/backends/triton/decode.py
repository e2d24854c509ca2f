"""The decoding kernels: one query per sequence against the stores of a cache, split over their keys.

One launch serves the heads of all stores: each finds its keys by addresses in a table on the device. The
first split appends the new key, and attends to it and to the sinks that have left the ring; each of the
others has a range of slots. A second kernel merges the splits in their order, and counts the new token.
"""

# Triton's language has no types:
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from longshort.backends.triton.visibility import LOG2E, exponent, scores_of, unit_of_scores

COLUMNS = tl.constexpr(11)
"""The columns of the table: addresses of k and v, stride of the batch, slots, ring, number of lost positions;
addresses of the sinks' k and v, their stride of the batch and number; the most tokens of the cache."""

SMALLEST_SPLIT = tl.constexpr(128)


@triton.jit(do_not_specialize=["stride_ids", "stride_all_sinks", "sinks", "heads", "kv_heads", "batch"])
def decode_kernel(
    Q, K, V, TABLE, LENGTH, OUT, ROW_MAX, ROW_SUM, WINDOWS, SLOPES, KEY_IDS, ALL_SINKS,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kd, stride_vb, stride_vh, stride_vd,
    stride_ids, stride_all_sinks, sinks, scale, softcap, heads, kv_heads, batch,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, SINKS: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a split's share: the unscaled sums, the row maximum and the row sum of each query head.

    OUT is (splits, batch, heads, D), ROW_MAX and ROW_SUM are (splits, batch, heads). LENGTH is the number of
    tokens before the new one. ALL_SINKS has the positions of all sinks, in the order in which each store
    keeps them.
    """
    split = tl.program_id(1)
    b = tl.program_id(0) // kv_heads
    kv = tl.program_id(0) % kv_heads
    length = tl.load(LENGTH)
    window = tl.load(WINDOWS + kv)
    entry = TABLE + kv * COLUMNS
    has_room = length < tl.load(entry + 10)
    batch_at = b * tl.load(entry + 2)
    k_store = tl.load(entry).to(tl.pointer_type(K.dtype.element_ty)) + batch_at
    v_store = tl.load(entry + 1).to(tl.pointer_type(V.dtype.element_ty)) + batch_at
    if ALIGNED:  # so that several numbers are read at once
        k_store = tl.multiple_of(k_store, 16)
        v_store = tl.multiple_of(v_store, 16)
    slots = tl.load(entry + 3)
    ring = tl.load(entry + 4)
    lost = tl.load(entry + 5)
    first = lost
    if ring > 0:
        first = tl.maximum(lost, length + 1 - ring)

    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    is_row = row < GROUP
    is_channel = channel < D
    h = kv * GROUP + row
    q = tl.load(
        Q + b.to(tl.int64) * stride_qb + h[:, None].to(tl.int64) * stride_qh + channel[None, :] * stride_qd,
        mask=is_row[:, None] & is_channel[None, :], other=0.0,
    )  # fmt: skip
    slope = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slope = tl.load(SLOPES + h, mask=is_row, other=0.0)
    query_id = tl.zeros([], tl.int64)
    ids_at = KEY_IDS + b.to(tl.int64) * stride_ids
    if SEGMENTS:
        query_id = tl.load(ids_at + length, mask=has_room, other=-1)
    sinks_at = ALL_SINKS + b.to(tl.int64) * stride_all_sinks

    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    index = tl.arange(0, KEYS)
    at = (split * batch + b).to(tl.int64) * heads + h
    # each store is divided by its own length
    used = tl.minimum(slots, length)
    parts = tl.num_programs(1) - 1
    share = (tl.maximum((used + parts - 1) // parts, SMALLEST_SPLIT) + KEYS - 1) // KEYS * KEYS
    if split == 0:
        new_k = tl.load(
            K + b.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh + channel * stride_kd,
            mask=is_channel, other=0.0,
        )  # fmt: skip
        new_v = tl.load(
            V + b.to(tl.int64) * stride_vb + kv.to(tl.int64) * stride_vh + channel * stride_vd,
            mask=is_channel, other=0.0,
        )  # fmt: skip
        is_new = index == 0
        seen = is_new & (query_id >= 0)
        block_k = tl.where(is_new[:, None], new_k[None, :], 0.0)
        block_v = tl.where(seen[:, None], new_v[None, :], 0.0)
        distance = index * 0
        slot = tl.where(ring > 0, length % tl.maximum(ring, 1), length) * has_room
        leaving = length - ring  # the position whose slot the new key takes
        if SINKS:
            count = tl.load(entry + 9)
            sink_at = b * tl.load(entry + 8)
            sink_k = tl.load(entry + 6).to(tl.pointer_type(K.dtype.element_ty)) + sink_at
            sink_v = tl.load(entry + 7).to(tl.pointer_type(V.dtype.element_ty)) + sink_at
            rank = -1
            for sink in range(sinks):
                is_it = (tl.load(sinks_at + sink) == leaving) & (sink < count)
                rank = tl.where(is_it, sink, rank)
            moves = (rank >= 0) & (ring > 0) & (leaving >= tl.maximum(lost, 0)) & has_room
            old_mask = is_channel & moves
            old_k = tl.load(k_store + slot * D + channel, mask=old_mask, other=0.0)
            old_v = tl.load(v_store + slot * D + channel, mask=old_mask, other=0.0)
            tl.store(sink_k + rank * D + channel, old_k, mask=old_mask)
            tl.store(sink_v + rank * D + channel, old_v, mask=old_mask)
            shows = moves
            if SEGMENTS:
                old_id = tl.load(ids_at + leaving, mask=moves, other=-1)
                shows = moves & (old_id == query_id) & (query_id >= 0)
            is_old = (index == 1) & shows
            block_k = tl.where(is_old[:, None], old_k[None, :], block_k)
            block_v = tl.where(is_old[:, None], old_v[None, :], block_v)
            distance = tl.where(is_old, ring.to(tl.int32), distance)
            seen = seen | is_old
        row_max, row_sum, acc = add_block(
            row_max, row_sum, acc, q, block_k.to(q.dtype), block_v.to(q.dtype), seen, distance, slope, scale,
            softcap, SOFTCAP, ALIBI, PRECISION,
        )  # fmt: skip
        tl.store(k_store + slot * D + channel, new_k, mask=is_channel & has_room)
        tl.store(v_store + slot * D + channel, new_v, mask=is_channel & has_room)
        if SINKS:
            for start in range(0, count.to(tl.int32), KEYS):
                at_sink = start + index
                position = tl.load(sinks_at + at_sink, mask=at_sink < count, other=-1)
                # those from `first` on are in the ring still, or again
                visible = (position >= 0) & (position < first) & ((position != leaving) | (moves == 0))
                if SEGMENTS:
                    key_id = tl.load(ids_at + position, mask=visible, other=-1)
                    visible = visible & (key_id == query_id) & (query_id >= 0)
                mask = visible[:, None] & is_channel[None, :]
                offset = at_sink[:, None].to(tl.int64) * D + channel[None, :]
                k = tl.load(sink_k + offset, mask=mask, other=0.0)
                v = tl.load(sink_v + offset, mask=mask, other=0.0)
                row_max, row_sum, acc = add_block(
                    row_max, row_sum, acc, q, k, v, visible, (length - position).to(tl.int32), slope, scale,
                    softcap, SOFTCAP, ALIBI, PRECISION,
                )  # fmt: skip
        # the host may not know that the cache is full: it shows in the output
        row_sum = tl.where(has_room, row_sum, float("nan"))
        tl.store(OUT + at[:, None] * D + channel[None, :], acc, mask=is_row[:, None] & is_channel[None, :])
    else:
        begin = (split - 1) * share
        end = tl.minimum(begin + share, used)
        for start in range(begin.to(tl.int32), end.to(tl.int32), KEYS):
            slot = start + index
            position = slot.to(tl.int64)
            if ring > 0:
                # the last position before the new one that belongs in this slot
                behind = (length - 1 - position) % ring
                behind = tl.where(behind < 0, behind + ring, behind)
                position = length - 1 - behind
            visible = (slot < end) & (position >= first) & (position < length)
            near = position > length - window
            if SINKS:
                for sink in range(sinks):
                    near = near | (position == tl.load(sinks_at + sink))
            visible = visible & near
            if SEGMENTS:
                key_id = tl.load(ids_at + position, mask=visible, other=-1)
                visible = visible & (key_id == query_id) & (query_id >= 0)
            mask = visible[:, None] & is_channel[None, :]
            offset = slot[:, None].to(tl.int64) * D + channel[None, :]
            k = tl.load(k_store + offset, mask=mask, other=0.0)
            v = tl.load(v_store + offset, mask=mask, other=0.0)
            row_max, row_sum, acc = add_block(
                row_max, row_sum, acc, q, k, v, visible, (length - position).to(tl.int32), slope, scale,
                softcap, SOFTCAP, ALIBI, PRECISION,
            )  # fmt: skip
        if begin < end:
            mask = is_row[:, None] & is_channel[None, :]
            tl.store(OUT + at[:, None] * D + channel[None, :], acc, mask=mask)
    tl.store(ROW_MAX + at, row_max, mask=is_row)
    tl.store(ROW_SUM + at, row_sum, mask=is_row)


@triton.jit
def add_block(
    row_max, row_sum, acc, q, k, v, visible, distance, slope, scale, softcap,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a block of keys, of which hidden ones are 0, to the sums of the rows; all rows see the same."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = scores_of(products, distance[None, :], 0, scale, softcap, slope[:, None], SOFTCAP, ALIBI)
    unit = unit_of_scores(scale, SOFTCAP, ALIBI)
    scores = tl.where(visible[None, :], scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
    base = tl.where(new_max == -float("inf"), 0.0, new_max)
    shrink = tl.exp2(row_max * LOG2E - base * LOG2E)
    p = tl.exp2(exponent(scores, unit, base[:, None]))
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["splits", "heads", "rows"])
def merge_kernel(
    PARTS, PART_MAX, PART_SUM, OUT, LSE, LENGTH, stride_ob, stride_oh, stride_od, splits, heads, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a query head; `splits` is at most SPLITS. LENGTH grows by one."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(LENGTH, tl.load(LENGTH) + 1)
    b = program // heads
    h = program % heads
    split = tl.arange(0, SPLITS)
    is_split = split < splits
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < D
    at = split.to(tl.int64) * rows + program
    part_max = tl.load(PART_MAX + at, mask=is_split, other=-float("inf"))
    part_sum = tl.load(PART_SUM + at, mask=is_split, other=0.0)
    row_max = tl.max(part_max, 0)
    base = tl.where(row_max == -float("inf"), 0.0, row_max)
    shares = tl.where(part_sum == 0, 0.0, tl.exp2(part_max * LOG2E - base * LOG2E))
    row_sum = tl.sum(shares * part_sum, 0)
    # a split that sees nothing has written no sums
    mask = (part_sum != 0)[:, None] & is_channel[None, :]
    parts = tl.load(PARTS + at[:, None] * D + channel[None, :], mask=mask, other=0.0)
    divisor = tl.where(row_sum == 0, 1.0, row_sum)
    out = tl.sum(shares[:, None] * parts, 0) / divisor
    tl.store(
        OUT + b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh + channel * stride_od,
        out.to(OUT.dtype.element_ty), mask=is_channel,
    )  # fmt: skip
    if HAS_LSE:
        tl.store(LSE + program, tl.where(row_sum == 0, -float("inf"), base + tl.log(divisor)))

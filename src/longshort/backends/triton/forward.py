"""The forward kernel: one program per block of rows of one head, the heads with the longest rows first."""

# Triton's language has no types:
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from longshort.backends.triton.visibility import (
    LOG2E,
    SIZES,
    add_dot_of_visible,
    exponent,
    is_bad,
    scores_of,
    unit_of_scores,
    visible_pairs,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, OUT, ROW_MAX, LOG_SUM, LARGEST, ENTROPY, TOTAL,
    ORDER, WINDOWS, SLOPES, IDS, FIRST, LAST, SINKS_BEGIN, SINKS_END, SINK_POSITIONS,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_os, stride_od,
    stride_tokens, stride_sinks,
    S, T, sinks, scale, softcap, batch, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, STATS: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if CAREFUL:
        if not is_bad(tl.load(TOTAL)):
            return
    program = tl.program_id(0)
    # the last rows see the most keys: first, so that no program with long rows starts late
    block = blocks - 1 - program % blocks
    b = (program // blocks) % batch
    h = tl.load(ORDER + program // (blocks * batch))
    window = tl.load(WINDOWS + h)

    rows = block * ROWS + tl.arange(0, ROWS)
    query = rows + (T - S)
    is_row = rows < S
    channel = tl.arange(0, BLOCK_D)
    q_at = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    q = tl.load(
        q_at + rows[:, None].to(tl.int64) * stride_qs + channel[None, :] * stride_qd,
        mask=is_row[:, None] & (channel[None, :] < D), other=0.0,
    )  # fmt: skip
    k_at = K + b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v_at = V + b.to(tl.int64) * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + h)

    ids_at = IDS + b.to(tl.int64) * stride_tokens
    begin, inner_begin, inner_end, end, sinks_begin, sinks_end, query_id = keys_of_rows(
        block * ROWS, query, is_row, b.to(tl.int64) * stride_tokens, IDS, FIRST, LAST, SINKS_BEGIN, SINKS_END,
        S, T, window, sinks, ROWS, KEYS, CAUSAL, SEGMENTS, SINKS, CAREFUL,
    )  # fmt: skip

    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    if SINKS:
        if window < T:
            row_max, row_sum, acc, weighted, largest = add_keys(
                row_max, row_sum, acc, weighted, largest, sinks_begin, sinks_end,
                q, k_at, v_at, query, query_id, ids_at, SINK_POSITIONS + b.to(tl.int64) * stride_sinks,
                stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
                D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, True, True, STATS, CAREFUL, PRECISION,
            )  # fmt: skip
    row_max, row_sum, acc, weighted, largest = add_keys(
        row_max, row_sum, acc, weighted, largest, begin, inner_begin,
        q, k_at, v_at, query, query_id, ids_at, SINK_POSITIONS,
        stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
        D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, False, True, STATS, CAREFUL, PRECISION,
    )  # fmt: skip
    if not (SEGMENTS or CAREFUL):
        row_max, row_sum, acc, weighted, largest = add_keys(
            row_max, row_sum, acc, weighted, largest, inner_begin, inner_end,
            q, k_at, v_at, query, query_id, ids_at, SINK_POSITIONS,
            stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
            D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, False, False, STATS, CAREFUL, PRECISION,
        )  # fmt: skip
        row_max, row_sum, acc, weighted, largest = add_keys(
            row_max, row_sum, acc, weighted, largest, inner_end, end,
            q, k_at, v_at, query, query_id, ids_at, SINK_POSITIONS,
            stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
            D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, False, True, STATS, CAREFUL, PRECISION,
        )  # fmt: skip

    seen = row_sum != 0  # the largest score alone adds 1
    divisor = tl.where(seen, row_sum, 1.0)
    out = acc / divisor[:, None]
    o_at = OUT + b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    tl.store(
        o_at + rows[:, None].to(tl.int64) * stride_os + channel[None, :] * stride_od,
        out.to(OUT.dtype.element_ty), mask=is_row[:, None] & (channel[None, :] < D),
    )  # fmt: skip
    row_at = (b * heads + h).to(tl.int64) * S + rows
    log_sum = tl.log(divisor)
    tl.store(ROW_MAX + row_at, tl.where(row_max == -float("inf"), 0.0, row_max), mask=is_row)
    tl.store(LOG_SUM + row_at, tl.where(seen, log_sum, -float("inf")), mask=is_row)
    if STATS:
        at = (h * batch + b) * blocks + block
        tl.store(LARGEST + at, nan_max(tl.where(is_row, largest, 0.0)) * scale)
        entropy = tl.where(is_row & seen, log_sum - weighted / (divisor * LOG2E), 0.0)
        tl.store(ENTROPY + at, tl.sum(entropy))


@triton.jit
def keys_of_rows(
    row, query, is_row, tokens, IDS, FIRST, LAST, SINKS_BEGIN, SINKS_END, S, T, window, sinks,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SINKS: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Return the keys to visit for a block of rows, those among them that need no mask, the slots of the
    sinks, and the segment ids of the rows.

    `row` is the first of them, and `tokens` the offset of the sequence in the tensors of tokens.
    """
    begin, inner_begin, inner_end, end = key_range(row, S, T, window, ROWS, KEYS, CAUSAL)
    query_id = query  # unused without segments
    sinks_begin = 0
    sinks_end = sinks
    if SEGMENTS:
        query_id = tl.load(IDS + tokens + query, mask=is_row, other=-1)
        # the first block is aligned as without segments, so that sums have the same order
        first = tl.min(tl.load(FIRST + tokens + query, mask=is_row, other=T))
        begin = tl.maximum(begin, first // KEYS * KEYS)
        end = tl.minimum(end, tl.max(tl.load(LAST + tokens + query, mask=is_row, other=-1)) + 1)
        if SINKS:
            sinks_begin = tl.min(tl.load(SINKS_BEGIN + tokens + query, mask=is_row, other=T))
            sinks_end = tl.max(tl.load(SINKS_END + tokens + query, mask=is_row, other=0))
    if SEGMENTS or CAREFUL:
        inner_begin, inner_end = end, end  # every tile is masked
    inner_begin = tl.maximum(tl.minimum(inner_begin, end), begin)
    inner_end = tl.maximum(inner_end, inner_begin)
    return begin, inner_begin, inner_end, end, sinks_begin, sinks_end, query_id


@triton.jit
def key_range(row, S, T, window, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the keys that a block of rows sees, `begin` to `end`, and those that all of its rows see.

    All but `end` are multiples of KEYS. Sinks beyond the window do not count.
    """
    low = row + T - S  # position of the first row
    high = tl.minimum(row + ROWS, S) - 1 + T - S
    begin = tl.maximum(low - window + 1, 0) // KEYS * KEYS
    inner_begin = (tl.maximum(high - window + 1, 0) + KEYS - 1) // KEYS * KEYS
    if CAUSAL:
        end = high + 1
        inner_end = (low + 1) // KEYS * KEYS
    else:
        end = tl.minimum(high + window, T)
        inner_end = tl.minimum(low + window, T) // KEYS * KEYS
    return begin, inner_begin, inner_end, end


@triton.jit
def add_keys(
    row_max, row_sum, acc, weighted, largest, begin, end,
    q, k_at, v_at, query, query_id, ids_at, positions_at,
    stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, MASKED: tl.constexpr, STATS: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys from `begin` to `end`, or with SINKS the sinks in these slots, to the sums of the rows."""
    channel = tl.arange(0, BLOCK_D)
    unit = unit_of_scores(scale, SOFTCAP, ALIBI)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < end
        if SINKS:
            key = tl.load(positions_at + key, mask=is_key, other=-1)
            is_key = is_key & (key >= 0)
        key_id = key
        if SEGMENTS:
            key_id = tl.load(ids_at + key, mask=is_key, other=-1)
        loaded = channel[:, None] < D
        if MASKED:
            loaded = loaded & is_key[None, :]
        k = tl.load(
            k_at + key[None, :].to(tl.int64) * stride_ks + channel[:, None] * stride_kd,
            mask=loaded, other=0.0,
        )  # fmt: skip
        products = tl.dot(q, k, input_precision=PRECISION)
        scores = scores_of(products, query[:, None], key[None, :], scale, softcap, slope, SOFTCAP, ALIBI)
        visible = tl.full(products.shape, 1, tl.int1)
        if MASKED:
            visible = visible_pairs(
                query[:, None], key[None, :], query_id[:, None], key_id[None, :], window, T,
                CAUSAL, SEGMENTS, SINKS,
            ) & is_key[None, :]  # fmt: skip
            scores = tl.where(visible, scores, -float("inf"))
        if STATS:
            largest = tl.maximum(
                largest, nan_max_rows(tl.where(visible, tl.abs(products), 0.0)), tl.PropagateNan.ALL
            )
        new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
        base = tl.where(new_max == -float("inf"), 0.0, new_max)  # no key was visible so far
        moved_by = row_max * LOG2E - base * LOG2E
        shrink = tl.exp2(moved_by)
        shifted = exponent(scores, unit, base[:, None])
        p = tl.exp2(shifted)
        if STATS:
            moved = tl.where(row_sum == 0, 0.0, moved_by * row_sum)
            terms = tl.where(p == 0, 0.0, shifted * p)
            weighted = (weighted + moved) * shrink + tl.sum(terms, 1)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v_mask = channel[None, :] < D
        if MASKED:
            v_mask = v_mask & is_key[:, None]
        v = tl.load(
            v_at + key[:, None].to(tl.int64) * stride_vs + channel[None, :] * stride_vd,
            mask=v_mask, other=0.0,
        )  # fmt: skip
        acc = add_dot_of_visible(acc * shrink[:, None], p, v, visible, KEYS, CAREFUL, PRECISION)
        row_max = new_max
    return row_max, row_sum, acc, weighted, largest


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, tl.PropagateNan.ALL)


@triton.jit
def nan_max_rows(x):
    """Return the largest number of each row, or NaN if there is one."""
    return tl.reduce(x, 1, _larger)


@triton.jit
def nan_max(x):
    """Return the largest number, or NaN if there is one."""
    return tl.reduce(x, 0, _larger)

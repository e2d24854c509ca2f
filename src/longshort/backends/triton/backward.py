"""The backward kernels: delta of each row, the gradient of q by rows, those of k and v by keys.

Scores are computed again, and probabilities come from the saved row maximum and log of the row sum. Each
program owns what it writes, and sums in a fixed order, so that results are the same bits on each run.
"""

# Triton's language has no types:
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from longshort.backends.triton.forward import keys_of_rows
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


@triton.jit(do_not_specialize=["S", "heads"])
def delta_kernel(
    OUT, GRAD_OUT, GRAD_LSE, DELTA,
    stride_ob, stride_oh, stride_os, stride_od, stride_gb, stride_gh, stride_gs, stride_gd,
    stride_lb, stride_lh, stride_ls, S, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Compute delta = Σ grad_out·out - grad_lse, which the gradients of a row's scores have in common."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    is_row = rows < S
    channel = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (channel[None, :] < D)
    delta = tl.zeros([ROWS], tl.float32)
    if HAS_OUT:
        out = tl.load(
            OUT + b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
            + rows[:, None].to(tl.int64) * stride_os + channel[None, :] * stride_od, mask=mask, other=0.0,
        )  # fmt: skip
        grad = tl.load(
            GRAD_OUT + b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
            + rows[:, None].to(tl.int64) * stride_gs + channel[None, :] * stride_gd, mask=mask, other=0.0,
        )  # fmt: skip
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_LSE:
        grad_lse = tl.load(
            GRAD_LSE + b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh
            + rows.to(tl.int64) * stride_ls,
            mask=is_row, other=0.0,
        )  # fmt: skip
        delta = delta - grad_lse
    tl.store(DELTA + tl.program_id(0).to(tl.int64) * S + rows, delta, mask=is_row)


@triton.jit(do_not_specialize=SIZES)
def grad_q_kernel(
    Q, K, V, GRAD_OUT, GRAD_Q, ROW_MAX, LOG_SUM, DELTA, TOTAL,
    ORDER, WINDOWS, SLOPES, IDS, FIRST, LAST, SINKS_BEGIN, SINKS_END, SINK_POSITIONS,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_gb, stride_gh, stride_gs, stride_gd,
    stride_ob, stride_oh, stride_os, stride_od, stride_tokens, stride_sinks,
    S, T, sinks, scale, softcap, batch, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, HAS_OUT: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if CAREFUL:
        if not is_bad(tl.load(TOTAL)):
            return
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    b = (program // blocks) % batch
    h = tl.load(ORDER + program // (blocks * batch))
    window = tl.load(WINDOWS + h)
    rows = block * ROWS + tl.arange(0, ROWS)
    query = rows + (T - S)
    is_row = rows < S
    channel = tl.arange(0, BLOCK_D)
    row_mask = is_row[:, None] & (channel[None, :] < D)
    q_at = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    q = tl.load(
        q_at + rows[:, None].to(tl.int64) * stride_qs + channel[None, :] * stride_qd, mask=row_mask, other=0.0
    )
    grad_out = q  # unused without an output
    if HAS_OUT:
        g_at = GRAD_OUT + b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
        grad_out = tl.load(
            g_at + rows[:, None].to(tl.int64) * stride_gs + channel[None, :] * stride_gd,
            mask=row_mask, other=0.0,
        )  # fmt: skip
    row_at = (b * heads + h).to(tl.int64) * S + rows
    row_max = tl.load(ROW_MAX + row_at, mask=is_row, other=0.0)
    log_sum = tl.load(LOG_SUM + row_at, mask=is_row, other=0.0)
    delta = tl.load(DELTA + row_at, mask=is_row, other=0.0)
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

    grad = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if SINKS:
        if window < T:
            grad = add_gradient_of_rows(
                grad, sinks_begin, sinks_end, q, grad_out, row_max, log_sum, delta, k_at, v_at,
                query, query_id, ids_at, SINK_POSITIONS + b.to(tl.int64) * stride_sinks,
                stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
                D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, True, True, HAS_OUT, CAREFUL, PRECISION,
            )  # fmt: skip
    grad = add_gradient_of_rows(
        grad, begin, inner_begin, q, grad_out, row_max, log_sum, delta, k_at, v_at,
        query, query_id, ids_at, SINK_POSITIONS,
        stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
        D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, False, True, HAS_OUT, CAREFUL, PRECISION,
    )  # fmt: skip
    if not (SEGMENTS or CAREFUL):
        grad = add_gradient_of_rows(
            grad, inner_begin, inner_end, q, grad_out, row_max, log_sum, delta, k_at, v_at,
            query, query_id, ids_at, SINK_POSITIONS,
            stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
            D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, False, False, HAS_OUT, CAREFUL, PRECISION,
        )  # fmt: skip
        grad = add_gradient_of_rows(
            grad, inner_end, end, q, grad_out, row_max, log_sum, delta, k_at, v_at,
            query, query_id, ids_at, SINK_POSITIONS,
            stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
            D, BLOCK_D, KEYS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, False, True, HAS_OUT, CAREFUL, PRECISION,
        )  # fmt: skip
    o_at = GRAD_Q + b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    tl.store(
        o_at + rows[:, None].to(tl.int64) * stride_os + channel[None, :] * stride_od,
        (grad * scale).to(GRAD_Q.dtype.element_ty), mask=row_mask,
    )  # fmt: skip


@triton.jit
def add_gradient_of_rows(
    grad, begin, end, q, grad_out, row_max, log_sum, delta, k_at, v_at,
    query, query_id, ids_at, positions_at,
    stride_ks, stride_kd, stride_vs, stride_vd, T, window, scale, softcap, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, MASKED: tl.constexpr, HAS_OUT: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `begin` to `end` give to the gradient of the rows of q, without its scale."""
    channel = tl.arange(0, BLOCK_D)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < end
        if SINKS:
            key = tl.load(positions_at + key, mask=is_key, other=-1)
            is_key = is_key & (key >= 0)
        key_id = key
        if SEGMENTS:
            key_id = tl.load(ids_at + key, mask=is_key, other=-1)
        mask = channel[None, :] < D
        if MASKED:
            mask = mask & is_key[:, None]
        k = tl.load(
            k_at + key[:, None].to(tl.int64) * stride_ks + channel[None, :] * stride_kd, mask=mask, other=0.0
        )
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        visible = tl.full(products.shape, 1, tl.int1)
        if MASKED:
            visible = visible_pairs(
                query[:, None], key[None, :], query_id[:, None], key_id[None, :], window, T,
                CAUSAL, SEGMENTS, SINKS,
            ) & is_key[None, :]  # fmt: skip
        v = k  # unused without an output
        if HAS_OUT:
            v = tl.load(
                v_at + key[:, None].to(tl.int64) * stride_vs + channel[None, :] * stride_vd,
                mask=mask, other=0.0,
            )  # fmt: skip
        _, grad_scores = gradient_of_scores(
            products, visible, query[:, None], key[None, :], row_max[:, None], log_sum[:, None],
            delta[:, None], grad_out, tl.trans(v), scale, softcap, slope, SOFTCAP, ALIBI, MASKED, HAS_OUT,
            PRECISION,
        )  # fmt: skip
        grad = add_dot_of_visible(grad, grad_scores, k, visible, KEYS, CAREFUL, PRECISION)
    return grad


@triton.jit
def gradient_of_scores(
    products, visible, query, key, row_max, log_sum, delta, first, second, scale, softcap, slope,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, HAS_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of a tile and the gradients of its logits; both are 0 on hidden pairs.

    The gradient of the probabilities is first @ second: grad_out·vᵀ, or v·grad_outᵀ for a tile of
    keys × rows.
    """
    scores = scores_of(products, query, key, scale, softcap, slope, SOFTCAP, ALIBI)
    unit = unit_of_scores(scale, SOFTCAP, ALIBI)
    p = tl.exp2(exponent(scores, unit, row_max) - log_sum * LOG2E)
    if HAS_OUT:
        grad_scores = p * (tl.dot(first, second, input_precision=PRECISION) - delta)
    else:
        grad_scores = -p * delta
    if SOFTCAP:
        capped = scores_of(products, query, key, scale, softcap, slope, SOFTCAP, False) / softcap
        grad_scores = grad_scores * (1 - capped * capped)
    if MASKED:
        p = tl.where(visible, p, 0.0)
        grad_scores = tl.where(visible, grad_scores, 0.0)
    return p, grad_scores


@triton.jit(do_not_specialize=SIZES)
def grad_kv_kernel(
    Q, K, V, GRAD_OUT, GRAD_K, GRAD_V, SINK_K, SINK_V, ROW_MAX, LOG_SUM, DELTA, TOTAL,
    ORDER, WINDOWS, SLOPES, IDS, FIRST, LAST, SLOTS, SINK_POSITIONS,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_gb, stride_gh, stride_gs, stride_gd,
    stride_tokens, stride_slots, stride_sinks,
    S, T, sinks, scale, softcap, batch, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_SINKS: tl.constexpr, SINKS: tl.constexpr, HAS_OUT: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of keys and values.

    With SINKS the block is one of sinks, and only rows beyond the window count: their sums go to SINK_K and
    SINK_V, (batch, kv_heads, slots, D), to be added by the programs of the same keys without SINKS.
    """
    if CAREFUL:
        if not is_bad(tl.load(TOTAL)):
            return
    program = tl.program_id(0)
    block = program % blocks  # the first keys are seen by the most rows
    b = (program // blocks) % batch
    kv = tl.load(ORDER + program // (blocks * batch)) // GROUP
    window = tl.load(WINDOWS + kv * GROUP)
    key = block * KEYS + tl.arange(0, KEYS)
    channel = tl.arange(0, BLOCK_D)
    slot = key
    if SINKS:
        is_key = key < sinks
        key = tl.load(SINK_POSITIONS + b.to(tl.int64) * stride_sinks + key, mask=is_key, other=-1)
        is_key = is_key & (key >= 0)
    else:
        is_key = key < T
    mask = is_key[:, None] & (channel[None, :] < D)
    k_at = K + b.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh
    k = tl.load(
        k_at + key[:, None].to(tl.int64) * stride_ks + channel[None, :] * stride_kd, mask=mask, other=0.0
    )
    v = k
    if HAS_OUT:
        v_at = V + b.to(tl.int64) * stride_vb + kv.to(tl.int64) * stride_vh
        v = tl.load(
            v_at + key[:, None].to(tl.int64) * stride_vs + channel[None, :] * stride_vd, mask=mask, other=0.0
        )

    # rows of queries, from those at position `low` to those at `high`
    lowest = tl.min(tl.where(is_key, key, T))
    highest = tl.max(tl.where(is_key, key, -1))
    low = tl.maximum(lowest - window + 1, 0)
    high = tl.minimum(highest + window - 1, T - 1)
    if SINKS:
        low = 0
        high = T - 1
    if CAUSAL:
        low = lowest
    key_id = key
    ids_at = IDS
    if SEGMENTS:
        tokens = b.to(tl.int64) * stride_tokens
        ids_at = IDS + tokens
        key_id = tl.load(ids_at + key, mask=is_key, other=-1)
        low = tl.maximum(low, tl.min(tl.load(FIRST + tokens + key, mask=is_key, other=T)))
        high = tl.minimum(high, tl.max(tl.load(LAST + tokens + key, mask=is_key, other=-1)))
    begin = tl.maximum(low - (T - S), 0) // ROWS * ROWS
    end = tl.minimum(high - (T - S) + 1, S)
    # and those for which no pair is hidden
    if SEGMENTS or SINKS or CAREFUL:
        inner_begin, inner_end = end, end
    else:
        last = tl.minimum(block * KEYS + KEYS, T) - 1
        if CAUSAL:
            inner_low = last
        else:
            inner_low = last - window + 1
        inner_begin = (tl.maximum(inner_low - (T - S), 0) + ROWS - 1) // ROWS * ROWS
        inner_end = tl.maximum(tl.minimum(block * KEYS + window - (T - S), S), 0) // ROWS * ROWS
    inner_begin = tl.maximum(tl.minimum(inner_begin, end), begin)
    inner_end = tl.maximum(inner_end, inner_begin)

    grad_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    if (not SINKS) or (window < T):
        for member in range(GROUP):
            h = kv * GROUP + member
            slope = 0.0
            if ALIBI:
                slope = tl.load(SLOPES + h)
            q_at = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
            g_at = GRAD_OUT + b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
            row_at = (b * heads + h).to(tl.int64) * S
            grad_k, grad_v = add_gradients_of_keys(
                grad_k, grad_v, begin, inner_begin, k, v, key, key_id, is_key, q_at, g_at,
                ROW_MAX + row_at, LOG_SUM + row_at, DELTA + row_at, ids_at,
                stride_qs, stride_qd, stride_gs, stride_gd, S, T, window, scale, softcap, slope,
                D, BLOCK_D, ROWS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, SINKS, True, HAS_OUT, CAREFUL, PRECISION,
            )  # fmt: skip
            if not (SEGMENTS or SINKS or CAREFUL):
                grad_k, grad_v = add_gradients_of_keys(
                    grad_k, grad_v, inner_begin, inner_end, k, v, key, key_id, is_key, q_at, g_at,
                    ROW_MAX + row_at, LOG_SUM + row_at, DELTA + row_at, ids_at,
                    stride_qs, stride_qd, stride_gs, stride_gd, S, T, window, scale, softcap, slope,
                    D, BLOCK_D, ROWS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, SINKS, False, HAS_OUT, CAREFUL,
                    PRECISION,
                )  # fmt: skip
                grad_k, grad_v = add_gradients_of_keys(
                    grad_k, grad_v, inner_end, end, k, v, key, key_id, is_key, q_at, g_at,
                    ROW_MAX + row_at, LOG_SUM + row_at, DELTA + row_at, ids_at,
                    stride_qs, stride_qd, stride_gs, stride_gd, S, T, window, scale, softcap, slope,
                    D, BLOCK_D, ROWS, CAUSAL, SOFTCAP, ALIBI, SEGMENTS, SINKS, True, HAS_OUT, CAREFUL,
                    PRECISION,
                )  # fmt: skip
    grad_k = grad_k * scale

    kv_heads = heads // GROUP
    if SINKS:
        # rows beyond `sinks` of a block are not stored
        at = (b * kv_heads + kv).to(tl.int64) * sinks + slot
        stored = (slot < sinks)[:, None] & (channel[None, :] < D)
        tl.store(SINK_K + at[:, None] * D + channel[None, :], grad_k, mask=stored)
        if HAS_OUT:
            tl.store(SINK_V + at[:, None] * D + channel[None, :], grad_v, mask=stored)
    else:
        if HAS_SINKS:
            slot = tl.load(SLOTS + b.to(tl.int64) * stride_slots + key, mask=is_key, other=-1)
            at = (b * kv_heads + kv).to(tl.int64) * sinks + slot
            is_sink = (slot >= 0)[:, None] & (channel[None, :] < D)
            grad_k += tl.load(SINK_K + at[:, None] * D + channel[None, :], mask=is_sink, other=0.0)
            if HAS_OUT:
                grad_v += tl.load(SINK_V + at[:, None] * D + channel[None, :], mask=is_sink, other=0.0)
        at = ((b * kv_heads + kv).to(tl.int64) * T + key)[:, None] * D + channel[None, :]
        tl.store(GRAD_K + at, grad_k.to(GRAD_K.dtype.element_ty), mask=mask)
        if HAS_OUT:
            tl.store(GRAD_V + at, grad_v.to(GRAD_V.dtype.element_ty), mask=mask)


@triton.jit
def add_gradients_of_keys(
    grad_k, grad_v, begin, end, k, v, key, key_id, is_key, q_at, g_at, max_at, sum_at, delta_at, ids_at,
    stride_qs, stride_qd, stride_gs, stride_gd, S, T, window, scale, softcap, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, MASKED: tl.constexpr, HAS_OUT: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the rows from `begin` to `end` give to the gradients of a block of keys, without k's scale."""
    channel = tl.arange(0, BLOCK_D)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        query = rows + (T - S)
        is_row = rows < S
        mask = channel[None, :] < D
        if MASKED:
            mask = mask & is_row[:, None]
        q = tl.load(
            q_at + rows[:, None].to(tl.int64) * stride_qs + channel[None, :] * stride_qd, mask=mask, other=0.0
        )
        row_max = tl.load(max_at + rows, mask=is_row, other=0.0)
        log_sum = tl.load(sum_at + rows, mask=is_row, other=0.0)
        delta = tl.load(delta_at + rows, mask=is_row, other=0.0)
        query_id = query
        if SEGMENTS:
            query_id = tl.load(ids_at + query, mask=is_row, other=-1)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (keys, rows)
        visible = tl.full(products.shape, 1, tl.int1)
        if MASKED:
            visible = visible_pairs(
                query[None, :], key[:, None], query_id[None, :], key_id[:, None], window, T,
                CAUSAL, SEGMENTS, SINKS,
            ) & is_key[:, None] & is_row[None, :]  # fmt: skip
        grad_out = q
        if HAS_OUT:
            grad_out = tl.load(
                g_at + rows[:, None].to(tl.int64) * stride_gs + channel[None, :] * stride_gd,
                mask=mask, other=0.0,
            )  # fmt: skip
        p, grad_scores = gradient_of_scores(
            products, visible, query[None, :], key[:, None], row_max[None, :], log_sum[None, :],
            delta[None, :], v, tl.trans(grad_out), scale, softcap, slope, SOFTCAP, ALIBI, MASKED, HAS_OUT,
            PRECISION,
        )  # fmt: skip
        if HAS_OUT:
            grad_v = add_dot_of_visible(grad_v, p, grad_out, visible, ROWS, CAREFUL, PRECISION)
        grad_k = add_dot_of_visible(grad_k, grad_scores, q, visible, ROWS, CAREFUL, PRECISION)
    return grad_k, grad_v

"""What every kernel knows of a tile: which of its pairs are visible, and their scores.

Row i of the queries is at position i + T - S. A window is a number of keys, more than there are for a global
head, so that no kernel treats global heads in another way. With segments each token has a `first` and a
`last`, the smallest and the largest position that has its segment id, which bound the loops; padding has
none.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

SIZES = ["S", "T", "sinks", "batch", "heads", "blocks"]
"""Arguments for whose values no kernel is compiled anew, such as a length that is a multiple of 16."""


@triton.jit
def visible_pairs(
    query, key, query_id, key_id, window, T, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, SINKS: tl.constexpr
):
    """Mark the visible pairs of a tile: (rows, keys) for positions query (rows, 1) and key (1, keys).

    With SINKS, the tile holds sink tokens, and those within the window are left to the tiles of the band.
    """
    behind = query - key
    if CAUSAL:
        visible = behind >= 0
        near = behind < window
    else:
        near = tl.abs(behind) < window
        visible = near | True
    if SINKS:
        visible = visible & (near == 0)
    else:
        visible = visible & near
    visible = visible & (query < T) & (key < T) & (key >= 0)
    if SEGMENTS:
        visible = visible & (query_id == key_id) & (query_id >= 0)
    return visible


@triton.jit
def scores_of(products, query, key, scale, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Turn products q·k into scores: scale, softcap, then ALiBi. Without the last two the products are left
    as they are, and the score is a product times `unit_of_scores`."""
    scores = products
    if SOFTCAP or ALIBI:
        scores = products * scale
    if SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    if ALIBI:
        scores = scores - slope * tl.abs(query - key).to(tl.float32)
    return scores


@triton.jit
def unit_of_scores(scale, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Return the factor that turns what `scores_of` returns into scores; above 0, so that -inf stays -inf."""
    if SOFTCAP or ALIBI:
        unit = tl.full([], 1.0, tl.float32)
    else:
        unit = tl.maximum(scale, 1e-30)
    return unit


@triton.jit
def exponent(scores, unit, row_max):
    """Return log2 of exp(unit·scores - row_max), rounded once: the same bits in all kernels."""
    return tl.fma(scores, unit * LOG2E, -(row_max * LOG2E))


@triton.jit
def tanh(x):
    """Compute tanh without a library, which the interpreter lacks: by exp, and near 0 by its series."""
    decay = exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    far = tl.where(x < 0, -far, far)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.01, near, far)


@triton.jit
def exp(x):
    """Compute e^x by the hardware's power of 2, from a difference that was rounded once."""
    return tl.exp2(x * LOG2E)


@triton.jit
def is_bad(total):
    """Return whether a sum is NaN or infinite, so that one of its terms may be."""
    return (total != total) | (tl.abs(total) == float("inf"))


@triton.jit
def add_dot_of_visible(
    total, weights, x, visible, KEYS: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute total + weights @ x, where weights (rows, KEYS) are 0 on hidden pairs and x is (KEYS, dim).

    0·NaN is NaN: CAREFUL leaves hidden pairs out of the sums. It is slow, and gives the same bits where x is
    finite.
    """
    if CAREFUL:
        finite = (x == x) & (tl.abs(x) < float("inf"))
        shown = tl.where(finite, x, 0.0).to(x.dtype)
        total = tl.dot(weights.to(x.dtype), shown, total, input_precision=PRECISION)
        others = tl.where(finite, 0.0, x.to(tl.float32))
        column = tl.arange(0, KEYS)
        for key in range(KEYS):
            weight = tl.sum(tl.where(column[None, :] == key, weights, 0.0), 1)
            seen = tl.sum(tl.where(column[None, :] == key, visible.to(tl.int32), 0), 1) > 0
            entry = tl.sum(tl.where(column[:, None] == key, others, 0.0), 0)
            there = tl.sum(tl.where(column[:, None] == key, (finite == 0).to(tl.int32), 0), 0) > 0
            term = weight[:, None] * entry[None, :]
            total = tl.where(seen[:, None] & there[None, :], total + term, total)
    else:
        total = tl.dot(weights.to(x.dtype), x, total, input_precision=PRECISION)
    return total

"""What every kernel knows of a tile: which of its pairs are visible, and their scores.

Row i of the queries is at position i + T - S. A window is a number of keys, more than there are for a global
head, so that no kernel treats global heads in another way. With segments each token has a `first` and a
`last`, the smallest and the largest position that has its segment id, which bound the loops; padding has
none.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def scores_of(logits, query, key, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Turn scaled logits into scores: softcap, then ALiBi."""
    scores = logits
    if SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    if ALIBI:
        scores = scores - slope * tl.abs(query - key).to(tl.float32)
    return scores


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
def dot_of_visible(weights, x, visible, KEYS: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """Compute weights @ x, where weights (rows, KEYS) are 0 on hidden pairs and x is (KEYS, dim).

    0·NaN is NaN: CAREFUL leaves hidden pairs out of the sums. It is slow, and gives the same bits where x is
    finite.
    """
    if CAREFUL:
        finite = (x == x) & (tl.abs(x) < float("inf"))
        total = tl.dot(weights.to(x.dtype), tl.where(finite, x, 0.0).to(x.dtype), input_precision=PRECISION)
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
        total = tl.dot(weights.to(x.dtype), x, input_precision=PRECISION)
    return total

"""The growth of the largest row range with the length that the number of logits alone explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch

from longshort.reporting.intervals import slope
from longshort.stability.probe import STRIDE


def chance_slope(lengths: Sequence[int], heads: int) -> float:
    """Compute the slope of the log row range over log n of logits that are independent and normal.

    A longer sequence has more probed queries, each of which sees more keys, so that the largest range of a
    row grows also where logits are alike at all lengths.

    Args:
        lengths: two or more numbers of tokens of a sequence.
        heads: number of heads that are probed, in all sequences together.
    """
    found = slope([(math.log(length), math.log(_expected_range(length, heads))) for length in lengths])
    assert found is not None
    return found


@cache
def _expected_range(length: int, heads: int) -> float:
    """Integrate the expectation of the largest range of the probed rows of independent normal logits.

    The range of t normal numbers is at most r with probability t·∫ φ(x)·(Φ(x + r) − Φ(x))^(t − 1) dx.
    """
    step = 0.05  # the smallest of many numbers varies little, and errors take the power of all rows
    x = torch.arange(-8.0, 8.0, step, dtype=torch.float64)[:, None]
    r = torch.arange(0.0, 20.0, 0.1, dtype=torch.float64)
    density = step * (-0.5 * x**2).exp() / math.sqrt(2 * math.pi)
    between = torch.special.ndtr(x + r) - torch.special.ndtr(x)
    rows = range((length - 1) % STRIDE, length, STRIDE)
    all_below = torch.ones_like(r)
    for seen in (row + 1 for row in rows):
        below = seen * (density * between ** (seen - 1)).sum(0)
        all_below *= below.clamp(max=1.0) ** heads
    return float(torch.trapezoid(1 - all_below, r))

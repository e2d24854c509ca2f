"""The search for the heads that keep the distance: by slopes at gates, and by losses.

A unit is a set of heads that change together: one key/value head, or all of a layer. Slopes rank units, and
measured losses decide between those at the margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from longshort.conversion.heads import Kept, KVHead

if TYPE_CHECKING:
    from longshort.conversion.heads import DecoderHeads

Unit = frozenset[KVHead]
Estimate = Callable[[Kept, Sequence[Unit]], Sequence[float]]
"""The change of the loss, nats per token, if each of the units alone is flipped in a state."""
Loss = Callable[[Kept], float]
"""The loss of a state, nats per token."""
Slopes = Callable[[Mapping[KVHead, float]], Mapping[KVHead, float]]
"""The slopes of the loss over gates, see `longshort.conversion.gates`."""


def head_units(heads: DecoderHeads) -> list[Unit]:
    """Return each candidate as a unit of its own."""
    return [frozenset([head]) for head in heads.candidates]


def layer_units(heads: DecoderHeads) -> list[Unit]:
    """Return the candidates of each layer as one unit."""
    by_layer: dict[int, list[KVHead]] = {}
    for head in heads.candidates:
        by_layer.setdefault(head.layer, []).append(head)
    return [frozenset(together) for together in by_layer.values()]


def by_score(scores: Mapping[KVHead, float], units: Sequence[Unit]) -> list[Unit]:
    """Sort units by the sums of their scores, the largest first; among equals as they came."""
    return sorted(units, key=lambda unit: -sum(scores[head] for head in unit))


def score_path(heads: DecoderHeads, points: Sequence[float], slopes: Slopes) -> dict[KVHead, float]:
    """Score each head by its mean slope at points of the path on which all gates close together, with its
    sign changed: what its distance is worth, while the others lose theirs.

    With many points, evenly spread over 0 … 1, these are integrated gradients (Sundararajan, Taly and Yan,
    2017), and the scores add up to the whole rise of the loss.

    Args:
        heads: whose candidates are scored.
        points: places of all gates, in 0 … 1.
        slopes: measures slopes at gates.
    """
    scores = dict.fromkeys(heads.candidates, 0.0)
    for point in points:
        measured = slopes(dict.fromkeys(heads.candidates, point))
        for head, slope in measured.items():
            scores[head] -= slope / len(points)
    return scores


def descend(
    heads: DecoderHeads, scores: Mapping[KVHead, float], most: int, rounds: int, slopes: Slopes
) -> dict[KVHead, float]:
    """Move gates towards a small loss with `most` of them open, by the method of Frank and Wolfe (1956).

    Each round ranks heads by their slopes at the gates so far, and moves these gates towards the layout that
    keeps the best, by 2 / (round + 3) of the way.

    Args:
        heads: whose candidates have gates.
        scores: rank the layout to start from.
        most: heads that may be global.
        rounds: number of rounds.
        slopes: measures slopes at gates.

    Returns:
        The gates, which score heads for a layout of `most`; among equal gates `scores` decide, slightly.
    """
    units = head_units(heads)
    start = first_units(by_score(scores, units), most)
    gates = {head: float(head in start) for head in heads.candidates}
    for number in range(rounds):
        measured = slopes(gates)
        best = first_units(by_score({head: -slope for head, slope in measured.items()}, units), most)
        share = 2 / (number + 3)
        gates = {head: gate + share * ((head in best) - gate) for head, gate in gates.items()}
    largest = max(map(abs, scores.values()), default=0.0) or 1.0
    return {head: gate + 1e-6 * scores[head] / largest for head, gate in gates.items()}


def fewest_within(units: Sequence[Unit], highest: float, loss: Loss) -> Kept:
    """Keep as few of the first units as the loss allows, by bisection, as if it fell with each.

    Args:
        units: disjoint units, the most important first.
        highest: the loss that is allowed; all units together keep to it.
        loss: the loss of the heads that are kept.
    """
    low, high = -1, len(units)
    while high - low > 1:
        middle = (low + high) // 2
        if loss(frozenset().union(*units[:middle])) <= highest:
            high = middle
        else:
            low = middle
    return frozenset().union(*units[:high])


def greedy_order(units: Sequence[Unit], most: int, estimate: Estimate) -> list[Unit]:
    """Sort units by making them local, the cheapest first, until at most `most` heads are global.

    Each round makes half of the excess local, at least one unit, and ranks the rest again.

    Args:
        units: disjoint units.
        most: heads that may remain global; they are sorted by the last ranking.
        estimate: estimates the cost of making each unit local.

    Returns:
        All units, the most important first.
    """
    kept: Kept = frozenset().union(*units)
    left, gone = list(units), []
    while len(kept) > most:
        costs = estimate(kept, left)
        left = [left[index] for _, index in sorted((cost, index) for index, cost in enumerate(costs))]
        goal = len(kept) - (len(kept) - most + 1) // 2
        while len(kept) > goal:
            gone.append(left.pop(0))
            kept -= gone[-1]
    return left[::-1] + gone[::-1]


def first_units(units: Sequence[Unit], most: int) -> Kept:
    """Keep the first units, as long as at most `most` heads are kept."""
    kept: Kept = frozenset()
    for unit in units:
        if len(kept) + len(unit) > most:
            break
        kept |= unit
    return kept


def add_units(units: Sequence[Unit], kept: Kept, most: int, estimate: Estimate) -> Kept:
    """Make units global, those that gain most first, as long as at most `most` heads are."""
    left = [unit for unit in units if not unit & kept]
    gains = estimate(kept, left) if len(kept) < most and left else []
    for _, index in sorted((gain, index) for index, gain in enumerate(gains)):
        if len(kept | left[index]) <= most:
            kept |= left[index]
    return kept


def exchange(
    kept: Kept,
    units: Sequence[Unit],
    shortlist: int,
    rounds: int,
    estimate: Estimate,
    measured: Estimate,
    loss: Loss,
) -> Kept:
    """Exchange global and local units for as long as the loss falls.

    In each round estimates name the global units whose loss costs least and the local ones that would gain
    most; of these, `shortlist` each, the changes are measured. The best pairs, or the best half of them, or
    the best alone are exchanged, whichever gives a lower loss first.

    Args:
        kept: the heads that are global at first.
        units: disjoint units, all of one size.
        shortlist: units of each kind to measure.
        rounds: largest number of rounds.
        estimate: names the shortlist.
        measured: measures it.
        loss: decides.
    """
    best = loss(kept)
    for _ in range(rounds):
        inside = [unit for unit in units if unit <= kept]
        outside = [unit for unit in units if not unit & kept]
        if not inside or not outside:
            return kept
        inside, costs = _shortlist(kept, inside, shortlist, estimate, measured)
        outside, gains = _shortlist(kept, outside, shortlist, estimate, measured)
        pairs = [
            (cost + gain, leaving, coming)
            for (cost, leaving), (gain, coming) in zip(
                sorted(zip(costs, inside, strict=True), key=_value),
                sorted(zip(gains, outside, strict=True), key=_value),
                strict=False,
            )
        ]
        promising = [(leaving, coming) for change, leaving, coming in pairs if change < 0] or [pairs[0][1:]]
        count = len(promising)
        while count:
            chosen = promising[:count]
            other = kept.difference(*(pair[0] for pair in chosen)).union(*(pair[1] for pair in chosen))
            if (value := loss(other)) < best:
                kept, best = other, value
                break
            count //= 2
        else:
            return kept
    return kept


def _shortlist(
    kept: Kept, units: Sequence[Unit], size: int, estimate: Estimate, measured: Estimate
) -> tuple[list[Unit], Sequence[float]]:
    estimates = estimate(kept, units)
    order = sorted(range(len(units)), key=lambda index: (estimates[index], index))
    chosen = [units[index] for index in order[:size]]
    return chosen, measured(kept, chosen)


def _value(pair: tuple[float, Unit]) -> float:
    return pair[0]

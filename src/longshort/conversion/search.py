"""The search for the heads that keep the distance: which units to make local, by estimates and by losses.

A unit is a set of heads that change together: one key/value head, or all of a layer. Estimates, cheap or
dear, say how the loss changes if a unit is flipped from a given state; they rank, and the loss decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from longshort.conversion.heads import Kept, KVHead

if TYPE_CHECKING:
    from longshort.conversion.heads import DecoderHeads

Unit = frozenset[KVHead]
Estimate = Callable[[Kept, Sequence[Unit]], Sequence[float]]
"""From a state, the change of the loss if each of the units alone is flipped, nats per token."""
Loss = Callable[[Kept], float]
"""The loss of a state, nats per token."""


def head_units(heads: DecoderHeads) -> list[Unit]:
    """Return each candidate as a unit of its own."""
    return [frozenset([head]) for head in heads.candidates]


def layer_units(heads: DecoderHeads) -> list[Unit]:
    """Return the candidates of each layer as one unit."""
    by_layer: dict[int, list[KVHead]] = {}
    for head in heads.candidates:
        by_layer.setdefault(head.layer, []).append(head)
    return [frozenset(together) for together in by_layer.values()]


def rank(estimates: Mapping[KVHead, float], most: int) -> Kept:
    """Keep the `most` heads with the largest values; among equals the first."""
    return frozenset(sorted(estimates, key=lambda head: (-estimates[head], head))[:most])


def remove_units(units: Sequence[Unit], kept: Kept, most: int, estimate: Estimate) -> Kept:
    """Make units local until at most `most` heads are global, the cheapest first.

    Each round makes local half of what is still too much, at least one unit, and estimates the rest anew.

    Args:
        units: disjoint units.
        kept: the heads that are global at first, a union of units.
        most: heads that may remain.
        estimate: ranks the units.
    """
    while len(kept) > most:
        left = [unit for unit in units if unit <= kept]
        costs = estimate(kept, left)
        excess = len(kept) - most
        goal = len(kept) - (excess + 1) // 2
        for _, index in sorted((cost, index) for index, cost in enumerate(costs)):
            kept -= left[index]
            if len(kept) <= goal:
                break
    return kept


def remove_within(units: Sequence[Unit], kept: Kept, highest: float, estimate: Estimate, loss: Loss) -> Kept:
    """Make units local, the cheapest first, as long as the loss is at most `highest`.

    Removes a quarter of the units at a time; where that is too much, half as many, down to one.

    Raises:
        ValueError: the loss is too high at first.
    """
    if loss(kept) > highest:
        raise ValueError(f"the loss must be at most {highest:.4f} to begin with, got {loss(kept):.4f}")
    step = max(1, len(units) // 4)
    while True:
        left = [unit for unit in units if unit <= kept]
        if not left:
            return kept
        costs = estimate(kept, left)
        order = [left[index] for _, index in sorted((cost, index) for index, cost in enumerate(costs))]
        step = min(step, len(order))
        while step:
            fewer = kept - frozenset().union(*order[:step])
            if loss(fewer) <= highest:
                break
            step //= 2
        if not step:
            return kept
        kept = fewer


def add_units(units: Sequence[Unit], kept: Kept, most: int, estimate: Estimate) -> Kept:
    """Make units global as long as at most `most` heads are, those first that gain most."""
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
        rounds: the most rounds.
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

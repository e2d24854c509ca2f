"""Arms, the sweeps that find their learning rates, and the plan of their trials.

To make comparisons fair, every arm has its own sweep, or that of the arm it names, run in full on the first
seed. The arm is then run on all seeds at its best rate and, if verdicts depend on it, at the next lower one:
rates that diverge later look good in short runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from longshort.studies.framework.study import Plan, Results, Trial

Rate = Literal["best", "lower"]
RATES: tuple[Rate, ...] = ("best", "lower")
"""The best rate of an arm and the next lower one."""


@dataclass(frozen=True)
class Ladder:
    """The learning rates of a sweep, and the rule for the best of them.

    Attributes:
        rates: half powers of ten, ascending, that every sweep tries; a single rate is not extended.
        digits: significant digits of a rate: 3e-3 with one, 3.16e-3 with three.
        extensions: number of rates that a sweep may add, each next to a best one at its edge.
        loss: the key of the results that is lowest at the best rate; None counts as infinite.
        floor: losses below this count as equal to it.
        tie: losses above the lowest by at most this share of it are ties, of which the lowest rate is best.
    """

    rates: Sequence[float]
    digits: int = 1
    extensions: int = 2
    loss: str = "validation_loss"
    floor: float = 0.0
    tie: float = 0.0

    def neighbour(self, rate: float, direction: int) -> float:
        """Return the next rate of … 1e-3, 3e-3, 1e-2 … upwards (1) or downwards (-1)."""
        return float(f"{10 ** ((round(2 * math.log10(rate)) + direction) / 2):.{self.digits}g}")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: trials that differ in seed and learning rate alone.

    Attributes:
        name: name in tables and legends.
        trial: makes the trial of a learning rate and a seed.
        ladder: the rates of its sweep.
        swept: the arm whose sweep gives the rates; None: this one.
    """

    name: str
    trial: Callable[[float, int], Trial]
    ladder: Ladder
    swept: Arm | None = None


@dataclass(frozen=True)
class Sweep:
    """The sweep of an arm, as far as there are results.

    Attributes:
        name: name of the arm.
        ladder: the rates of the sweep.
        losses: losses by ascending rate; None if one was not finite, or is not known yet.
        trials: one trial per rate, in the same order.
        is_done: whether all losses are known and no extension of the rates is pending.
    """

    name: str
    ladder: Ladder
    losses: Mapping[float, float | None]
    trials: Sequence[Trial]
    is_done: bool

    @property
    def best(self) -> float:
        """The lowest rate whose loss ties with the lowest; the lowest rate of all if every run diverged."""
        losses = {
            rate: math.inf if loss is None else max(loss, self.ladder.floor)
            for rate, loss in self.losses.items()
        }
        limit = min(losses.values()) * (1 + self.ladder.tie)
        return min(rate for rate, loss in losses.items() if loss <= limit)

    @property
    def lower(self) -> float:
        """The next rate below the best, whether it was tried or not."""
        lower = [rate for rate in self.losses if rate < self.best]
        return max(lower, default=self.ladder.neighbour(self.best, -1))

    def rate(self, name: Rate) -> float:
        """Return the best or the next lower rate."""
        return self.best if name == "best" else self.lower

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return self.best in (min(self.losses), max(self.losses))


def sweep(arm: Arm, results: Results, seed: int) -> Sweep:
    """Make the sweep of an arm on a seed; its rates are extended while the best one is at an edge."""
    arm = arm.swept or arm
    ladder = arm.ladder
    rates = sorted(ladder.rates)
    extensions = ladder.extensions if len(rates) > 1 else 0
    while True:
        trials = [arm.trial(rate, seed) for rate in rates]
        known = [results.get(trial.key) for trial in trials]
        losses = {
            rate: None if result is None else result[ladder.loss]
            for rate, result in zip(rates, known, strict=True)
        }
        found = Sweep(arm.name, ladder, losses, trials, all(result is not None for result in known))
        if not (found.is_done and found.is_at_edge and extensions):
            return found
        extensions -= 1
        if found.best == rates[0]:
            rates = [ladder.neighbour(rates[0], -1), *rates]
        else:
            rates = [*rates, ladder.neighbour(rates[-1], 1)]


def plan_arms(
    arms: Iterable[Arm], seeds: Sequence[int], results: Results, rates: Sequence[Rate] = RATES
) -> Plan:
    """Plan the sweeps on the first seed, and the main trials of arms whose sweep is done; may repeat trials.

    Args:
        arms: arms, in the order in which they are run.
        seeds: seeds of the main trials.
        results: results so far.
        rates: rates at which the main trials are run.
    """
    trials: list[Trial] = []
    later_work = 0.0
    for arm in arms:
        found = sweep(arm, results, seeds[0])
        trials += found.trials
        if found.is_done:
            trials += [arm.trial(found.rate(rate), seed) for rate in rates for seed in seeds]
        else:
            later_work += arm.trial(arm.ladder.rates[0], seeds[0]).work * (len(seeds) - 1) * len(rates)
    return Plan(trials, later_work)

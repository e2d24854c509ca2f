"""Intervals over seeds. Seeds are few, so intervals use Student's t distribution, and are wide.

A value that is missing or not finite (a run that diverged) makes an interval unknown: from −∞ to ∞.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Attributes:
        mean: NaN if a value was missing.
        low, high: −∞ and ∞ for fewer than two values.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def is_known(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def p_below(self, bound: float) -> float:
        """Return the two-sided p-value of `bound` if the estimate is below it, else 1."""
        return self.p_value(bound) if self.mean < bound else 1.0

    def p_above(self, bound: float) -> float:
        """Return the two-sided p-value of `bound` if the estimate is above it, else 1."""
        return self.p_value(bound) if self.mean > bound else 1.0

    def p_value(self, bound: float) -> float:
        """Compute the two-sided p-value of a mean that equals `bound`, by the same t distribution; 1 where
        the interval is not known."""
        if not self.is_known:
            return 1.0
        half = (self.high - self.low) / 2
        if half == 0:
            return float(self.mean == bound)
        quantile = float(student.ppf((1 + LEVEL) / 2, self.count - 1))
        return 2 * float(student.sf(abs(self.mean - bound) * quantile / half, self.count - 1))

    def times(self, factor: float) -> Interval:
        """Return the interval of a multiple; the factor is > 0."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high, self.count)

    def exp(self) -> Interval:
        """Return the interval of a ratio from that of its logarithm."""
        return Interval(_exp(self.mean), _exp(self.low), _exp(self.high), self.count)


def confidence_interval(values: Iterable[float | None]) -> Interval:
    """Compute the 95 % confidence interval of the mean: mean ± t·s/√n, with n − 1 degrees of freedom."""
    return _student(values, lambda count: 1 / count)


def prediction_interval(values: Iterable[float | None]) -> Interval:
    """Compute the 95 % prediction interval of one more value, as of another seed: mean ± t·s·√(1 + 1/n)."""
    return _student(values, lambda count: 1 + 1 / count)


def log_prediction_interval(values: Iterable[float | None]) -> Interval:
    """Compute the same interval for a positive quantity that varies by factors, from its logarithm."""
    return prediction_interval(log_or_none(value) for value in values).exp()


def paired_difference(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> Interval:
    """Compute the confidence interval of first − second over the seeds that both have."""
    seeds = sorted(first.keys() & second.keys())
    return confidence_interval(_difference(first[seed], second[seed]) for seed in seeds)


def paired_log_ratio(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> Interval:
    """Compute the confidence interval of log(first / second) over the seeds that both have."""
    return paired_difference(
        {seed: log_or_none(value) for seed, value in first.items()},
        {seed: log_or_none(value) for seed, value in second.items()},
    )


def log_slopes(by_size: Mapping[int, Mapping[int, float | None]]) -> dict[int, float | None]:
    """Compute the least-squares slope of log value over log size, by seed, from the values of each size by
    seed; None where one is missing."""
    seeds = next(iter(by_size.values()))
    return {
        seed: slope([(math.log(size), log_or_none(values[seed])) for size, values in by_size.items()])
        for seed in seeds
    }


def slope(points: Sequence[tuple[float, float | None]]) -> float | None:
    """Compute the least-squares slope of y over x; None if a y is missing or there are fewer than two x."""
    if any(not _is_finite(y) for _, y in points) or len({x for x, _ in points}) < 2:
        return None
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points if y is not None)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in points if y is not None)
    return covariance / sum((x - x_mean) ** 2 for x, _ in points)


def log_or_none(value: float | None) -> float | None:
    """Compute the natural logarithm; None if there is none."""
    return math.log(value) if value is not None and _is_finite(value) and value > 0 else None


def _student(values: Iterable[float | None], variance_factor: Callable[[int], float]) -> Interval:
    known = list(values)
    numbers = [value for value in known if value is not None and _is_finite(value)]
    if not numbers or len(numbers) < len(known):
        return Interval(math.nan, -math.inf, math.inf, len(known))
    mean = fmean(numbers)
    if len(numbers) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    quantile = float(student.ppf((1 + LEVEL) / 2, len(numbers) - 1))
    half = quantile * stdev(numbers) * math.sqrt(variance_factor(len(numbers)))
    return Interval(mean, mean - half, mean + half, len(numbers))


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf

"""Comparing trained arms: their values over seeds, at their best rates and at the next lower ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from longshort.reporting.intervals import (
    Interval,
    log_prediction_interval,
    paired_difference,
    paired_log_ratio,
    prediction_interval,
)
from longshort.reporting.page import Table, number
from longshort.studies.language import Arm, Setting, Sweep, language_trial, main_trials, sweep
from longshort.studies.language_run import loss_at_flops
from longshort.studies.study import Outcome, Plan, Results, Trial

Rate = Literal["best", "lower"]
RATES: tuple[Rate, ...] = ("best", "lower")
PREDICTED = ("validation_loss", "max_logit", "max_logit_in_band", "row_range")
"""What the tables show of an arm."""


@dataclass(frozen=True)
class Trained:
    """The main trials of an arm, all done.

    Attributes:
        arm: which.
        sweep: of its learning rates.
        model, training: its settings, as in `language_trial`.
        results: by rate and seed.
    """

    arm: Arm
    sweep: Sweep
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    results: Mapping[Rate, Mapping[int, Mapping[str, Any]]]

    def values(self, name: str, rate: Rate = "best") -> dict[int, float | None]:
        """A number of the results by seed; None where it was not finite."""
        return {seed: result.get(name) for seed, result in self.results[rate].items()}

    def diverged(self, rate: Rate = "best") -> int:
        """How many seeds diverged."""
        return sum(result["diverged_at"] is not None for result in self.results[rate].values())

    def curves(self, name: str, rate: Rate = "best") -> list[list[tuple[float, float | None]]]:
        """A curve per seed: "loss_curve", "validation_curve" or one of the logit curves."""
        found = []
        for result in self.results[rate].values():
            curve = result[name] if name.endswith("_curve") else result["logit_curves"].get(name, [])
            found.append([(step, value) for step, value in curve])
        return found

    def seconds_per_step(self) -> float | None:
        """Median over its trials; None where it was not measured."""
        seconds = [
            result["tokens_per_step"] / result["timing"]["tokens_per_second"]
            for result in self.results["best"].values()
            if result.get("timing", {}).get("tokens_per_second")
        ]
        return median(seconds) if seconds else None


def plan_arms(
    setting: Setting, arms: Sequence[Arm], seeds: Sequence[int], results: Results, *, at_lower: bool = True
) -> Plan:
    """The sweeps, and the main trials of each arm whose sweep is done."""
    trials: list[Trial] = []
    later = 0.0
    for arm in arms:
        found = sweep(setting, arm, results, seeds[0])
        trials += found.trials
        if found.is_done:
            trials += main_trials(setting, arm, found, seeds, at_lower=at_lower)
        else:
            later += found.trials[0].work * (len(seeds) - 1) * (2 if at_lower else 1)
    return Plan(without_doubles(trials), later)


def without_doubles(trials: Sequence[Trial]) -> list[Trial]:
    """Each trial once, where it comes first."""
    return list({trial.key: trial for trial in reversed(trials)}.values())[::-1]


def trained_arms(
    setting: Setting, arms: Sequence[Arm], seeds: Sequence[int], results: Results, *, at_lower: bool = True
) -> dict[str, Trained]:
    """Arms by name, those whose main trials are all done."""
    found = {}
    for arm in arms:
        rates = sweep(setting, arm, results, seeds[0])
        trained = trained_arm(setting, arm, rates, seeds, results, at_lower=at_lower)
        if trained is not None:
            found[arm.name] = trained
    return found


def trained_arm(
    setting: Setting,
    arm: Arm,
    rates: Sweep,
    seeds: Sequence[int],
    results: Results,
    *,
    at_lower: bool = True,
) -> Trained | None:
    """The main trials of an arm at the rates of a sweep; None until all are done."""
    trials = main_trials(setting, arm, rates, seeds, at_lower=at_lower)
    if not rates.is_done or any(trial.key not in results for trial in trials):
        return None
    by_rate: dict[Rate, dict[int, Mapping[str, Any]]] = {
        name: {
            seed: results[language_trial(setting, arm, rate, seed).key]
            for seed in seeds
            if name == "best" or at_lower
        }
        for name, rate in zip(RATES, (rates.best, rates.lower), strict=True)
    }
    settings = trials[0].settings
    return Trained(arm, rates, settings["model"], settings["train"], by_rate)


def split_by_depth(trained: Mapping[str, Trained]) -> tuple[dict[str, Trained], dict[str, Trained]]:
    """The arms of the setting's depth, and those with one of their own, which do not compare with them."""
    deep = {name: arm for name, arm in trained.items() if "num_hidden_layers" in arm.arm.model}
    return {name: arm for name, arm in trained.items() if name not in deep}, deep


def log_ratio(first: Trained, second: Trained, name: str, rate: Rate = "best") -> Interval:
    """Paired log-ratio of a number of two arms, each at its own rate."""
    return paired_log_ratio(first.values(name, rate), second.values(name, rate))


def loss_difference(first: Trained, second: Trained, rate: Rate = "best") -> Interval:
    """Paired difference of the validation loss at equal steps, nats per token."""
    return paired_difference(first.values("validation_loss", rate), second.values("validation_loss", rate))


def loss_difference_at_equal_flops(first: Trained, second: Trained, rate: Rate = "best") -> Interval:
    """The same when both had spent what the cheaper one spends in all."""
    losses = []
    for trained, other in ((first, second), (second, first)):
        by_seed = {}
        for seed, result in trained.results[rate].items():
            budget = min(_flops(result), _flops(other.results[rate][seed]))
            by_seed[seed] = loss_at_flops(result, budget)
        losses.append(by_seed)
    return paired_difference(*losses)


def in_band_log_ratio(first: Trained, second: Trained, rate: Rate = "best") -> Interval:
    """Paired log-ratio of the largest logits over the pairs inside the window: equal sets of pairs."""
    return log_ratio(first, second, "max_logit_in_band", rate)


def edge_text(arms: Iterable[Trained]) -> str:
    """A warning for each arm whose best rate lies at the edge of its sweep; empty if none does."""
    names = [f"{arm.arm.name} ({rate_text(arm.sweep.best)})" for arm in arms if arm.sweep.is_at_edge]
    return f" Best rate at the edge of the sweep: {', '.join(names)}." if names else ""


def judge_below(interval: Interval, shown: float, partly: float) -> Outcome:
    """Shown if the interval lies below `shown`, partly if below `partly`, contradicted if above that."""
    if interval.high < shown:
        return Outcome.SHOWN
    if interval.high < partly:
        return Outcome.PARTLY
    return Outcome.CONTRADICTED if interval.low > partly else Outcome.NOT_SHOWN


def arm_table(trained: Mapping[str, Trained]) -> Table:
    """A row per arm at its best rate: means over seeds, with the 95 % prediction interval for another
    seed."""
    rows = []
    for name, arm in trained.items():
        results = list(arm.results["best"].values())
        rows.append(
            (
                name,
                f"{results[0]['parameters'] / 1000:,.0f}k",
                rate_cell(arm.sweep),
                *(spread_text(quantity, arm.values(quantity)) for quantity in PREDICTED),
                f"{arm.diverged()} of {len(results)}",
                f"{sum(result['spikes'] for result in results)}",
                number(_flops(results[0]) / 1e12),
            )
        )
    header = (
        "", "parameters", "rate", "validation loss", "largest logit", "in window", "row range", "diverged",
        "spikes", "TFLOPs",
    )  # fmt: skip
    return Table(header, rows)


def predictions(trained: Mapping[str, Trained]) -> dict[str, dict[str, Interval]]:
    """Where another seed's values will lie, by arm, at its best rate."""
    return {
        name: {quantity: predict(quantity, arm.values(quantity)) for quantity in PREDICTED}
        for name, arm in trained.items()
    }


def sweep_table(trained: Mapping[str, Trained]) -> Table:
    """A row per arm: the validation loss of the first seed at every rate of its sweep."""
    rates = sorted({rate for arm in trained.values() for rate in arm.sweep.losses})
    rows = []
    for name, arm in trained.items():
        cells = []
        for rate in rates:
            text = number(arm.sweep.losses[rate]) if rate in arm.sweep.losses else ""
            cells.append(f"{text} ←" if rate == arm.sweep.best else text)
        rows.append((name, *cells))
    return Table(("validation loss by learning rate, first seed", *map(rate_text, rates)), rows)


def predict(name: str, values: Mapping[int, float | None]) -> Interval:
    """Where another seed's value of a quantity will lie: losses by differences, logits by factors."""
    rule = prediction_interval if name.endswith("loss") else log_prediction_interval
    return rule(values.values())


def spread_text(name: str, values: Mapping[int, float | None]) -> str:
    """The mean of a quantity over seeds (of logits the geometric one), and its prediction interval."""
    return interval_text(predict(name, values))


def interval_text(interval: Interval) -> str:
    """Mean and ends, to three digits."""
    if not interval.is_known:
        return _short(interval.mean)
    return f"{_short(interval.mean)} [{_short(interval.low)}, {_short(interval.high)}]"


def difference_text(interval: Interval) -> str:
    """Mean and ends with signs."""
    if not interval.is_known:
        return f"{interval.mean:+.3f}" if interval.mean == interval.mean else "not finite"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def rate_text(rate: float) -> str:
    """A learning rate as it is written in the settings: 3e-3."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def rate_cell(rates: Sweep) -> str:
    """The best rate of a sweep, and whether it lies at its edge."""
    return rate_text(rates.best) + (" (edge)" if rates.is_at_edge else "")


def _short(value: float) -> str:
    return "not finite" if value != value else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _flops(result: Mapping[str, Any]) -> float:
    return result["validation_curve"][-1][0] * result["flops_per_step"]

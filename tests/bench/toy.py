"""A benchmark whose turns are scripted, and what tests read from results."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from longshort.bench.benchmark import Benchmark, Case
from longshort.bench.record import Column, in_same_round, wide
from longshort.bench.sweep import Results


@dataclass(frozen=True)
class ToyBenchmark(Benchmark):
    """Each provider's turns are functions; `groups_by_x` says who is measured with whom."""

    name = "toy"
    title = "Time of toys"
    known = ("first", "second", "third")
    baseline = "first"
    table = (Column("ms", "milliseconds", ".2f"), Column("speedup", "speedup", ".2f"))

    providers: tuple[str, ...] = ("first", "second")
    lengths: tuple[int, ...] = (64,)
    rounds: int = 2
    threads: int = 1

    def cases(self):
        columns = {"threads": self.threads, "window": None}
        return [Case(length, "a setting", self.threads, columns) for length in self.lengths]

    def turn(self, case, provider, inputs, note):
        return lambda: {"milliseconds": 1.0 + self.known.index(provider)}

    def derive(self, case, rounds):
        return rounds.assign(
            speedup=in_same_round(rounds, "milliseconds", self.baseline) / rounds["milliseconds"]
        )


def metrics(results: Results, at: str = "p50") -> dict[tuple[int, str], dict[str, float]]:
    """By x and provider a percentile of every metric that was measured."""
    tables: dict[Any, pd.DataFrame] = {x: wide(rows, at) for x, rows in results.rows.groupby("x", sort=False)}
    return {
        (x, provider): table.loc[provider].dropna().to_dict()
        for x, table in tables.items()
        for provider in table.index
    }

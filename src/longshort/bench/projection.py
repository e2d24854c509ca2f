"""Speed of projections of a few tokens: rows split over threads against nn.Linear.

All matrices of 12 layers of the preset paper-base are used in turn, so that none is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch import nn

from longshort.bench.benchmark import Benchmark, Case, Note, Turn
from longshort.bench.machine import count_threads, wall_seconds
from longshort.bench.record import Column, in_same_round
from longshort.projection import project

if TYPE_CHECKING:
    import pandas as pd

_SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
_LAYERS = 12


@dataclass(frozen=True)
class ProjectionBenchmark(Benchmark):
    """Time the projections of a few tokens by all matrices of paper-base, in turns.

    Times are wall times. GB/s count the weights once.
    """

    name = "projection"
    title = "Time of the projections of a few tokens"
    known = ("linear", "projection")
    baseline = "linear"
    table = (
        Column("ms", "milliseconds", ".1f"),
        Column("90 %", "milliseconds", ".1f", at="p90"),
        Column("speedup", "speedup", ".2f"),
        Column("GB/s", "gigabytes_per_second", ".1f"),
    )

    providers: tuple[str, ...] = known
    """linear, torch's product of nn.Linear; projection, the library's own product."""

    tokens: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 4, 8, 16)
    """Tokens that are multiplied at once."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    rounds: Annotated[int, Ge(1)] = 11
    """Rounds that are measured, after one for warm-up."""

    def cases(self) -> list[Case]:
        threads = self.threads or torch.get_num_threads()
        columns = {"threads": threads}
        setting = f"float32, {count_threads(threads)}"
        return [Case(tokens, setting, threads, columns) for tokens in dict.fromkeys(self.tokens)]

    def inputs(self, case: Case, group: Sequence[str]) -> list[nn.Linear]:
        """Make all matrices."""
        return [nn.Linear(*shape, bias=False) for _ in range(_LAYERS) for shape in _SHAPES]

    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        generator = torch.Generator().manual_seed(0)
        widths = {layer.in_features for layer in inputs}
        given = {width: torch.randn(1, case.x, width, generator=generator) for width in widths}

        def run() -> None:
            for layer in inputs:
                x = given[layer.in_features]
                project(layer, x) if provider == "projection" else layer(x)

        return torch.no_grad()(lambda: {"milliseconds": 1e3 * wall_seconds(run)})

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        milliseconds = rounds["milliseconds"]
        size = 4 * _LAYERS * sum(rows * columns for rows, columns in _SHAPES)
        return rounds.assign(
            speedup=in_same_round(rounds, "milliseconds", "linear") / milliseconds,
            gigabytes_per_second=size / milliseconds / 1e6,
        )

"""What a benchmark is: flags that give cases, and providers that take turns in each case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch

from longshort.bench.machine import machine_name
from longshort.bench.record import Column
from longshort.checks import check_fields, flag

Turn = Callable[[], Mapping[str, float | list[float]]]
"""One provider's work of a round, which returns metrics by name: a number, or several that all count."""

Note = Callable[[str], None]
"""Takes what the numbers of a provider leave out, in words."""

LeaveOut = Callable[[str, str], None]
"""Takes a provider that is not measured in a case, and why, in words."""


class UnsuitableError(Exception):
    """Why a provider cannot serve a case, in words for the user."""


@dataclass(frozen=True)
class Case:
    """One point of a sweep.

    Attributes:
        x: tokens; the axis of plots.
        setting: all the rest in words; cases of one setting share a panel of a plot.
        threads: CPU threads of torch while it is measured.
        columns: the setting in numbers, by name of the column.
    """

    x: int
    setting: str
    threads: int
    columns: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.x} token{'s' * (self.x != 1)}, {self.setting}"


@dataclass(frozen=True)
class Benchmark(ABC):
    """The flags of a benchmark, and what it does in each case. Subclasses add flags as fields.

    Attributes:
        name: the NAME of `longshort bench NAME`.
        title: what the plot shows, which is the table's first column.
        y_label: its unit.
        known: all providers that there are; each keeps its colour in every plot.
        baseline: the provider in grey.
        bound: a dashed line of the plot: its label, and the provider and metric that it shows.
        table: the columns that are printed for each case.
        warm_up: rounds before those that count.
    """

    out: Path | None = None
    """CSV file to make; a plot, a .png of the same name, goes beside it. Until the end the rows are in
    OUT.partial. None: only print."""

    overwrite: bool = False
    """Replace the files of OUT."""

    name: ClassVar[str]
    title: ClassVar[str]
    y_label: ClassVar[str] = "milliseconds"
    known: ClassVar[tuple[str, ...]]
    baseline: ClassVar[str]
    bound: ClassVar[tuple[str, str, str] | None] = None
    table: ClassVar[tuple[Column, ...]]
    warm_up: ClassVar[int] = 1
    providers: ClassVar[tuple[str, ...]]
    rounds: ClassVar[int]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value == ():
                raise ValueError(f"{flag(name)} must name at least one, got none")
        check_fields(self)
        require_among("--providers", self.providers, self.known)
        if self.out is not None and self.out.suffix != ".csv":
            raise ValueError(f"--out must end in .csv, got {str(self.out)!r}")

    @abstractmethod
    def cases(self) -> list[Case]:
        """The points of the sweep, each once, in the order in which they are measured."""

    @abstractmethod
    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        """Makes a provider ready to take turns.

        Args:
            case: what to do.
            provider: who does it.
            inputs: what `inputs` returned.
            note: takes what the numbers of this provider leave out.

        Raises:
            UnsuitableError: the provider cannot serve this case.
            RuntimeError: it failed, as without memory.
        """

    def groups(self, case: Case, leave_out: LeaveOut) -> list[list[str]]:
        """The providers that are measured in turns; one group is gone when the next is built."""
        return [list(dict.fromkeys(self.providers))]

    def inputs(self, case: Case, group: Sequence[str]) -> Any:
        """What the providers of a group share."""
        return None

    def each_round(self, case: Case) -> Mapping[str, float]:
        """Metrics that are measured once in a round, for all providers."""
        return {}

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        """Adds the metrics that follow from others to a table of metrics by group, round and provider."""
        return rounds

    def sentences(self, medians: pd.DataFrame) -> list[str]:
        """Lines below the table of a case, from medians by provider and metric."""
        return []

    def describe_machine(self) -> str:
        """The first line that is shown."""
        return machine_name()

    @property
    def torch_device(self) -> torch.device:
        """The device of the providers."""
        return torch.device("cpu")


def require_among(name: str, chosen: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises a ValueError that names the flag unless all that was chosen is allowed."""
    allowed = tuple(allowed)
    for choice in chosen:
        if choice not in allowed:
            raise ValueError(f"{name} must be among {', '.join(allowed)}, got {choice!r}")

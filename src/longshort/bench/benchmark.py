"""The definition of a benchmark: flags that give cases, and providers that take turns in each case."""

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
"""One provider's work in a round, which returns metrics by name: a number, or several samples."""

Note = Callable[[str], None]
"""A function that takes a remark on what the numbers of a provider leave out."""

LeaveOut = Callable[[str, str], None]
"""A function that takes a provider that is not measured in a case, and the reason."""


class UnsuitableError(Exception):
    """An error that tells the user why a provider cannot serve a case."""


@dataclass(frozen=True)
class Case:
    """One point of a sweep.

    Attributes:
        x: tokens; the x axis of plots.
        setting: everything else in words; cases of one setting share a panel of a plot.
        threads: CPU threads of torch during the measurement.
        columns: the values of the setting, by name of the column.
    """

    x: int
    setting: str
    threads: int
    columns: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.x} token{'s' * (self.x != 1)}, {self.setting}"


@dataclass(frozen=True)
class Benchmark(ABC):
    """The flags of a benchmark, and its work in each case. Subclasses add flags as fields.

    Attributes:
        name: the NAME of `longshort bench NAME`.
        title: title of the plot, which shows the table's first column.
        y_label: unit of the plot's y axis.
        known: all providers of this benchmark; each has the same colour and marker in every plot.
        baseline: the provider in grey.
        bound: a dashed line of the plot: its label, and the provider and metric that it shows.
        table: the columns that are printed for each case, on a CPU.
        warm_up: rounds before those that are measured.
    """

    out: Path | None = None
    """CSV file to write, with a plot beside it, a .png of the same name. Until the end the rows are in
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
            if isinstance(value, tuple | list) and not value:
                raise ValueError(f"{flag(name)} must name at least one, got none")
        check_fields(self)
        require_among("--providers", self.providers, self.known)
        if self.out is not None and self.out.suffix != ".csv":
            raise ValueError(f"--out must end in .csv, got {str(self.out)!r}")

    @abstractmethod
    def cases(self) -> list[Case]:
        """Return the points of the sweep, each once, in the order in which they are measured."""

    @abstractmethod
    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        """Make a provider ready to take turns.

        Args:
            case: the case to measure.
            provider: name of the provider.
            inputs: the result of `inputs`.
            note: takes a remark on what the numbers of this provider leave out.

        Raises:
            UnsuitableError: the provider cannot serve this case.
            RuntimeError: it failed, for example since memory ran out.
        """

    def groups(self, case: Case, leave_out: LeaveOut) -> list[list[str]]:
        """Divide providers into groups that are measured in turns; one is freed before the next is built."""
        return [list(dict.fromkeys(self.providers))]

    def inputs(self, case: Case, group: Sequence[str]) -> Any:
        """Make the inputs that the providers of a group share."""
        return None

    def each_round(self, case: Case) -> Mapping[str, float]:
        """Measure the metrics that are measured once in a round, for all providers."""
        return {}

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        """Add metrics that are computed from others to a table of metrics by group, round and provider."""
        return rounds

    def sentences(self, medians: pd.DataFrame) -> list[str]:
        """Return lines for below the table of a case, from medians by provider and metric."""
        return []

    def describe_machine(self) -> str:
        """Describe the machine in a line, which is printed first."""
        return machine_name(self.torch_device)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that are printed for each case on this device."""
        return self.table

    @property
    def torch_device(self) -> torch.device:
        """The device of the providers."""
        return torch.device("cpu")


def require_device(device: str) -> None:
    """Raise a ValueError that names the flag unless the device is a CPU or a GPU that is there."""
    require_among("--device", (device,), ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can use, and there is none")


def require_among(name: str, chosen: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise a ValueError that names the flag unless all choices are allowed."""
    allowed = tuple(allowed)
    for choice in chosen:
        if choice not in allowed:
            raise ValueError(f"{name} must be among {', '.join(allowed)}, got {choice!r}")

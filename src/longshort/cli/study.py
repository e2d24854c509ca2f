"""The command `longshort study`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro
from rich.live import Live
from rich.table import Table

from longshort.cli.flags import parse
from longshort.reporting.console import SECONDS_BETWEEN_LINES, console, has_bars
from longshort.studies.catalogue import StudySettings, run_studies
from longshort.studies.framework.runner import State, StudyProgress

if TYPE_CHECKING:
    from rich.console import Console

    from longshort.studies.framework.study import Trial

_TIME_IS_UP = 4
_SECONDS_BETWEEN_LINES = 6 * SECONDS_BETWEEN_LINES


@dataclass(frozen=True)
class StudyFlags(StudySettings):
    name: Annotated[str, tyro.conf.Positional]
    """dense-local, progress, allocation, explosion, length, remedies, design, latency, or all."""


def run(arguments: list[str]) -> int:
    settings = parse(StudyFlags, "study", arguments, StudySettings.__doc__)
    output = console()
    began = time.monotonic()
    try:
        with StudyDisplay(output) as display:
            report = run_studies(settings, display)
    except (KeyboardInterrupt, SystemExit):
        output.print("stopped; the same command resumes", markup=False)
        raise
    for verdicts in report.verdicts.values():
        for verdict in verdicts:
            output.print(f"\n[bold]{verdict.claim.id}: {verdict.outcome.value}[/bold]")
            output.print(verdict.evidence, markup=False)
    output.print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; report: {report.file}", markup=False)
    if not report.is_done:
        output.print(
            "the minutes are over before all trials are done; the same command resumes", markup=False
        )
        return _TIME_IS_UP
    return 0


class StudyDisplay(StudyProgress):
    """Shows running trials and the time left: a live table on a terminal, occasional lines elsewhere."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._live = Live(console=output, auto_refresh=False, transient=True)
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if has_bars(self._output):
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if has_bars(self._output):
            self._live.stop()

    def on_result(self, study: str, trial: Trial, seconds: float) -> None:
        self._output.print(f"{study}: {_describe(trial)} done in {seconds:.0f} s", markup=False)

    def on_state(self, state: State) -> None:
        if has_bars(self._output):
            self._live.update(_table(state), refresh=True)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            counts = ", ".join(
                f"{name} {state.done[name]}/{known}" for name, known in state.known.items() if known
            )
            self._output.print(f"{counts}; {describe_time(state.seconds_left)}", markup=False)


def describe_time(seconds: float | None) -> str:
    """Describe the time left in words."""
    if seconds is None:
        return "time left not known yet"
    return (
        f"about {seconds / 60:.0f} minutes left" if seconds >= 90 else f"about {max(seconds, 0):.0f} s left"
    )


def _table(state: State) -> Table:
    table: Any = Table(box=None, pad_edge=False, show_header=False)
    for name, known in state.known.items():
        table.add_row(name, f"{state.done[name]} of {known} trials", "")
    for running in state.running:
        table.add_row("", _describe(running.trial), f"{running.share:.0%}")
    table.add_row("", describe_time(state.seconds_left), "")
    return table


def _describe(trial: Trial) -> str:
    rate = trial.settings.get("train", {}).get("learning_rate")
    return f"{trial.arm}, seed {trial.seed}" + (f", rate {rate:g}" if rate else "")

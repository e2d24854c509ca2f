"""The command `longshort demo`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longshort.cli.flags import parse
from longshort.reporting.console import SECONDS_BETWEEN_LINES, bar_columns, console, flexible_column, has_bars
from longshort.studies.demo import MODELS, PROMPT, DemoProgress, DemoSettings, run_demo
from longshort.studies.demo_report import describe_outcome, result_table, write_demo_report
from longshort.training.display import describe_progress

if TYPE_CHECKING:
    from rich.console import Console

    from longshort.studies.demo import ModelResult


def run(arguments: list[str]) -> int:
    settings = parse(DemoSettings, "demo", arguments)
    output = console()
    began = time.monotonic()
    with DemoDisplay(output, settings.steps) as display:
        results = run_demo(settings, display)
    _print_results(output, settings, results)
    report = write_demo_report(settings, results)
    output.print(f"{(time.monotonic() - began) / 60:.1f} minutes; report: {report}", markup=False)
    return 0


class DemoDisplay(DemoProgress):
    """Shows stages as lines, and the two trainings as bars on a terminal, as occasional lines elsewhere."""

    def __init__(self, output: Console, steps: int) -> None:
        self._output = output
        self._steps = steps
        self._last_line = dict.fromkeys(MODELS, 0.0)
        width = max(map(len, MODELS))
        name = TextColumn(f"{{task.fields[model]:<{width}}}")
        columns = (name, *bar_columns(output, 8), MofNCompleteColumn(), flexible_column())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=output, expand=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._tasks:
            self._bar.stop()

    def on_stage(self, text: str) -> None:
        self._output.print(text, markup=False)

    def on_training(self, name: str, step: int, record: dict[str, Any]) -> None:
        if has_bars(self._output):
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task("", total=self._steps, model=name)
                self._bar.start()
            self._bar.update(self._tasks[name], completed=step, description=describe_progress(record))
        elif time.monotonic() - self._last_line[name] >= SECONDS_BETWEEN_LINES:
            self._last_line[name] = time.monotonic()
            line = f"{name:<13} step {step}/{self._steps}  {describe_progress(record)}"
            self._output.print(line, markup=False)


def _print_results(output: Console, settings: DemoSettings, results: dict[str, ModelResult]) -> None:
    content = result_table(results)
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(content.header):
        table.add_column(name, justify="right" if index else "left")
    for row in content.rows:
        table.add_row(*row)
    output.print()
    output.print(table)
    for paragraph in describe_outcome(settings, results):
        output.print(f"\n{paragraph}", markup=False)
    for name, result in results.items():
        if result.sample:
            output.print(f"\n[bold]{name} writes:[/bold]")
            output.print(PROMPT + result.sample, markup=False)
    output.print()

"""The output of work while it runs: bars on a terminal, a line in a notebook, occasional lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from IPython.display import DisplayHandle

SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_UPDATES = 0.5
_WIDTH_FOR_BARS = 60


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error for the caller; the method of rich would end the program."""
        raise BrokenPipeError


def console() -> Console:
    """Make a console for stdout that leaves numbers and paths as they are."""
    width = None if sys.stdout.isatty() else 110
    return _Console(highlight=False, soft_wrap=True, width=width, force_jupyter=False)


def has_bars(output: Console) -> bool:
    """Return whether lines of this console can be redrawn.

    It must be a terminal and not a dumb one. FORCE_COLOR, which many CI services set, does not make it one,
    nor does the pseudo-terminal in which a notebook runs `!longshort`, whose output is kept.
    """
    return output.file.isatty() and output.is_interactive and "JPY_PARENT_PID" not in os.environ


def bar_columns(output: Console, width: int) -> tuple[BarColumn, ...]:
    """Return a column with a progress bar, or nothing if the terminal is too narrow for bar and numbers."""
    return (BarColumn(width),) if output.width >= _WIDTH_FOR_BARS else ()


def flexible_column() -> TextColumn:
    """Make the column of a description that gives way to the others: with `expand=True` it is cut to what
    they leave."""
    return TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    return hasattr(get_ipython(), "kernel")


class NotebookLine:
    """A line of a notebook cell's output that is updated at most twice a second."""

    def __init__(self) -> None:
        self._handle: DisplayHandle | None = None
        self._text = self._shown = ""
        self._last_update = -math.inf

    def show(self, text: str) -> None:
        """Replace the line, if it is time to."""
        self._text = text
        if time.monotonic() - self._last_update >= _SECONDS_BETWEEN_UPDATES:
            self.flush()

    def flush(self) -> None:
        """Show the latest text."""
        from IPython.display import display

        if self._text == self._shown:
            return
        self._shown, self._last_update = self._text, time.monotonic()
        content = {"text/plain": self._text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function that takes the name of a stage, the work done and the total (None: not known), and
    shows them on stderr, so that stdout has results alone; in a notebook, in the output of the cell.

    `longshort.data.prepare` and other functions take it as `progress`.
    """
    if in_notebook():
        line = NotebookLine()
        try:
            yield lambda stage, done, total: line.show(_describe(stage, done, total))
        finally:
            line.flush()
        return
    output = Console(stderr=True, highlight=False)
    if not has_bars(output):
        yield _PlainLines().show
        return
    columns = (TextColumn("{task.description}"), *bar_columns(output, 40), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=output, transient=True) as bar:
        task = bar.add_task("", total=None)
        stage_now = ""

        def show(stage: str, done: int, total: int | None) -> None:
            nonlocal stage_now
            if stage != stage_now:
                bar.reset(task, description=stage, total=total)
                stage_now = stage
            bar.update(task, completed=done, total=total)

        yield show


def _describe(stage: str, done: int, total: int | None) -> str:
    return f"{stage}: {done / total:.0%}" if total else f"{stage}: {done:,}"


class _PlainLines:
    def __init__(self) -> None:
        self._last_line = time.monotonic()
        self._stage = ""
        self._begun, self._done_then = self._last_line, 0

    def show(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun, self._done_then = stage, now, done
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = self._time_left(done, total, now) if total else ""
            print(_describe(stage, done, total) + left, file=sys.stderr, flush=True)

    def _time_left(self, done: int, total: int, now: float) -> str:
        """The time left at the speed of the stage so far; nothing for less than two minutes."""
        if done <= self._done_then:
            return ""
        minutes = (now - self._begun) / (done - self._done_then) * (total - done) / 60
        return f", about {minutes:.0f} minutes left" if minutes >= 2 else ""

"""The output of commands while they run: progress bars on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 5.0


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error for the caller; the method of rich would end the program."""
        raise BrokenPipeError


def console() -> Console:
    """Make a console for stdout that leaves numbers and paths as they are."""
    width = None if sys.stdout.isatty() else 110
    return _Console(highlight=False, soft_wrap=True, width=width)


def discard_output() -> None:
    """Discard stdout once its reader is gone, so that flushing its buffer at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function that takes the name of a stage, the work done and the total (None: not known), and
    shows them on stderr, so that stdout has results alone."""
    output = Console(stderr=True, highlight=False)
    if not output.is_terminal:
        yield _PlainLines().show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output, transient=True) as bar:
        task = bar.add_task("", total=None)
        stage_now = ""

        def show(stage: str, done: int, total: int | None) -> None:
            nonlocal stage_now
            if stage != stage_now:
                bar.reset(task, description=stage, total=total)
                stage_now = stage
            bar.update(task, completed=done, total=total)

        yield show


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
            share = f"{done / total:.0%}{self._time_left(done, total, now)}" if total else f"{done:,}"
            print(f"{stage}: {share}", file=sys.stderr, flush=True)

    def _time_left(self, done: int, total: int, now: float) -> str:
        """The time left at the speed of the stage so far; nothing for less than two minutes."""
        if done <= self._done_then:
            return ""
        minutes = (now - self._begun) / (done - self._done_then) * (total - done) / 60
        return f", about {minutes:.0f} minutes left" if minutes >= 2 else ""

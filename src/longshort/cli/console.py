"""What the commands show while they work: bars on a terminal, a line now and then elsewhere."""

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
        """Leave it to the caller, where rich's own ends the program."""
        raise BrokenPipeError


def console() -> Console:
    """The terminal, or whatever stdout is; numbers and paths stay as they are."""
    width = None if sys.stdout.isatty() else 110
    return _Console(highlight=False, soft_wrap=True, width=width)


def discard_output() -> None:
    """Nobody reads stdout any more; what is left in its buffer must not fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """Gives a function of a stage's name, what is done of it and the total (None: not known)."""
    output = console()
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

    def show(self, stage: str, done: int, total: int | None) -> None:
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share = f"{done / total:.0%}" if total else f"{done:,}"
            print(f"{stage}: {share}", flush=True)

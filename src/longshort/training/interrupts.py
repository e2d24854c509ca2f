"""Ctrl-C and SIGTERM as requests that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """A context in which the first Ctrl-C or SIGTERM is recorded instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread, where Python handles no signals, the
    context does nothing.

    Args:
        is_patient: only record a second Ctrl-C, too: `torchrun` forwards the one that the terminal has
            already sent to all processes.

    Attributes:
        signal: number of the first signal; None until there is one.
    """

    def __init__(self, is_patient: bool):
        self.signal: int | None = None
        self._is_patient = is_patient
        self._ctrl_c_came = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._ctrl_c_came and not self._is_patient:
                raise KeyboardInterrupt
            self._ctrl_c_came = True
        if self.signal is None:
            self.signal = number

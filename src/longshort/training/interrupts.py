"""Ctrl-C and SIGTERM as a wish that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """While this context lasts, the first Ctrl-C or SIGTERM is noted instead of obeyed.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread, where Python takes no signals, it does
    nothing.

    Args:
        is_patient: a second Ctrl-C is noted only, too: `torchrun` passes on the one that the terminal sent to
            all processes already.

    Attributes:
        signal: number of the first signal that came; None until then.
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

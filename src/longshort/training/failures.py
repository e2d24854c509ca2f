"""The end of all processes when one of them fails, with one message.

Each process has a thread that writes a heartbeat into the store through which the processes found each other,
and reads whether another has failed. A process that raises writes why; one that dies counts as dead after a
minute of silence. Then all end within seconds, whatever they wait for: without this, a GPU would wait for a
dead one until the time-out.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from longshort.checks import is_switched_on

_BEAT = 1.0
_SILENCE = 60.0
_GRACE = 5.0
"""Seconds between heartbeats; without one, until a process counts as dead; and from another's failure until a
process ends that has not raised an error itself."""

_FAILURE, _HEARD = "failure", "heard"
_COMMUNICATION = re.compile(
    r"\b(gloo|nccl|connection|peer|timed out|timeout|socket|(tcp)?store)\b", re.IGNORECASE
)
_STORE_IS_GONE = "the process that held the store is gone"


class FailureWatch:
    """A context that ends this process when another one fails, and the others when this one does.

    Args:
        store: the store of the processes.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ChildProcessError: in place of an error of communication, on the main process: another one failed.
        SystemExit: on all others, in place of an error that the main process reports. With LONGSHORT_DEBUG=1
            in the environment those that failed themselves raise their errors as they are.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store = PrefixStore("longshort", store)
        self._rank, self._world_size = rank, world_size
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)

    def __enter__(self) -> FailureWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self._end()
            return
        is_own = not _is_of_communication(error)
        lost = str(error).partition("\n")[0]
        is_reported = False  # by the main process, in place of this one
        with _without_termination():
            cause = None if is_own else self._failure(wait=_GRACE)
            if cause is None:
                what = f"rank {self._rank} failed: {type(error).__name__}: {error}"
                self._report(what if is_own else f"the connection to another process was lost: {lost}")
                if self._rank:
                    is_reported = self._wait_until_heard()
                else:
                    self._hear()
            self._end()
        if cause is None and is_own:
            if is_reported and not is_switched_on("LONGSHORT_DEBUG"):
                raise SystemExit(1) from error
            return
        if cause is None or self._speaks(cause):
            text = cause or f"the connection to another process, which may have died, was lost: {lost}"
            raise ChildProcessError(text) from error
        raise SystemExit(1) from error

    def _speaks(self, cause: str) -> bool:
        """Return whether this process reports: the main one does, and all if it may be the one that died."""
        return self._rank == 0 or cause.startswith(_STORE_IS_GONE)

    def _end(self) -> None:
        self._is_over.set()
        self._thread.join(_GRACE)
        with suppress(RuntimeError):  # the process that held the store may be gone
            self._store.set(f"beat-{self._rank}", "over")

    def _hear(self) -> None:
        """Write, on the main process, that it reports a failure."""
        with suppress(RuntimeError):
            self._store.set(_HEARD, "yes")

    def _wait_until_heard(self) -> bool:
        """Give the main process time to hear of a failure: torchrun ends it as soon as this one is gone."""
        until = time.monotonic() + _GRACE
        with suppress(RuntimeError):
            while time.monotonic() < until:
                if self._store.check([_HEARD]):
                    return True
                time.sleep(0.1)
        return False

    def _report(self, text: str) -> None:
        with suppress(RuntimeError):
            self._store.compare_set(_FAILURE, "", text)

    def _failure(self, wait: float = 0.0) -> str | None:
        """Return what the first process that failed wrote, once it is there."""
        until = time.monotonic() + wait
        while True:
            try:
                if self._store.check([_FAILURE]):
                    if self._rank == 0:
                        self._hear()
                    return self._store.get(_FAILURE).decode()
            except RuntimeError as error:
                return f"{_STORE_IS_GONE}: {error}"
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)

    def _watch(self) -> None:
        beats = 0
        seen = [(b"", time.monotonic())] * self._world_size
        while not self._is_over.wait(_BEAT):
            beats += 1
            cause = self._failure()
            if cause is None:
                cause = self._beat(beats, seen)
            if cause is not None and not self._is_over.wait(_GRACE):
                if self._speaks(cause):
                    print(f"longshort: error: {cause}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits for a process that is gone

    def _beat(self, beats: int, seen: list[tuple[bytes, float]]) -> str | None:
        """Write a heartbeat; the main process also reads the others' and returns which one is silent."""
        try:
            self._store.set(f"beat-{self._rank}", str(beats))
            if self._rank:
                return None
            for rank in range(1, self._world_size):
                key = f"beat-{rank}"
                beat = self._store.get(key) if self._store.check([key]) else b""
                if beat != seen[rank][0]:
                    seen[rank] = beat, time.monotonic()
                elif beat != b"over" and time.monotonic() - seen[rank][1] > _SILENCE:
                    cause = f"rank {rank} has not answered for {_SILENCE:.0f} s"
                    self._report(cause)
                    return cause
        except RuntimeError as error:
            return f"{_STORE_IS_GONE}: {error}"
        return None


def _is_of_communication(error: BaseException) -> bool:
    """Return whether an error may be due to another process: gloo and the store raise a RuntimeError."""
    if isinstance(error, DistError):
        return True
    return type(error) is RuntimeError and bool(_COMMUNICATION.search(str(error)))


@contextmanager
def _without_termination() -> Iterator[None]:
    """Ignore SIGTERM, which torchrun sends as soon as one process has ended: this one has yet to say why."""
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, previous)


def meet(timeout: timedelta) -> tuple[Any, int, int]:
    """Find the other processes by the variables that torchrun sets: the store, rank and world size."""
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    return store, rank, world_size

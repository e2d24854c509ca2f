"""Encoding in several processes, in the order of the documents."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from longshort.data import encoder as program
from longshort.data.encoder import TextEncoder, read_blocks, write_blocks

_WAITING_PER_PROCESS = 2
_SECONDS_TO_END = 5.0


class HasTexts(Protocol):
    """Something with texts to encode."""

    @property
    def texts(self) -> list[str]: ...


Item = TypeVar("Item", bound=HasTexts)
Ids = list[NDArray[np.unsignedinteger]]


class EncodingProcesses:
    """Processes that encode texts, each with one thread; use it in a `with` block, which ends them.

    They end by themselves if this process dies. A thread here serves each, so no pipe can fill up.

    Args:
        encoder: what each of them does.
        count: number of processes, at least 1.
    """

    def __init__(self, encoder: TextEncoder, count: int) -> None:
        assert count >= 1
        self._count = count
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count)
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(count):
                self._processes.append(_start())
            for process in self._processes:
                _send(process, [encoder.serialized.encode()])
                self._free.put(process)
        except BaseException:
            self._end(at_once=True)
            raise

    def encode(self, items: Iterable[Item]) -> Iterator[tuple[Item, Ids]]:
        """Yield each item with the ids of its texts, in order; few items are read ahead.

        Raises:
            ChildProcessError: a process has died.
        """
        waiting: deque[tuple[Item, Future[Ids]]] = deque()
        for item in items:
            waiting.append((item, self._threads.submit(self._encode, item.texts)))
            if len(waiting) >= _WAITING_PER_PROCESS * self._count:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(at_once=error is not None)

    def _encode(self, texts: list[str]) -> Ids:
        process = self._free.get()
        _send(process, [text.encode() for text in texts])
        assert process.stdout is not None
        try:
            answer = read_blocks(process.stdout)
        except EOFError:
            raise _died(process) from None
        self._free.put(process)
        return [np.frombuffer(block, dtype="<u4") for block in answer]

    def _end(self, at_once: bool) -> None:
        for process in self._processes:
            if at_once:
                process.kill()  # a thread may be waiting for its answer
        for _ in range(self._count):  # a thread may be waiting for a process, if another one died
            for process in self._processes:
                self._free.put(process)
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            _close(process)


def _start() -> subprocess.Popen[bytes]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    path = program.__file__
    # -P: the folder of the file is no place to import from.
    return subprocess.Popen(
        [sys.executable, "-P", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def _send(process: subprocess.Popen[bytes], blocks: Sequence[bytes]) -> None:
    assert process.stdin is not None
    try:
        write_blocks(process.stdin, blocks)
    except (BrokenPipeError, ValueError):  # a ValueError where it is closed already
        raise _died(process) from None


def _died(process: subprocess.Popen[bytes]) -> ChildProcessError:
    try:
        code = process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        code = None
    reason = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    hint = "; it may have run out of memory: take fewer processes" if code == -9 else ""
    return ChildProcessError(f"a process that encodes text {reason}{hint}")


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()  # which tells it to end
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _result(item: Item, future: Future[Any]) -> tuple[Item, Ids]:
    return item, future.result()

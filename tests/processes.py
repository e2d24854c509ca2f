"""Several processes that run the same function of a test, within a time limit."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import TCPStore

SECONDS = 240
PRELOADED = ["longshort.distributed", "longshort.training.loop", "pytest", "transformers"]
"""Modules that a server imports once for all processes, since importing them takes longer than most tests.
The processes inherit its environment, which is that of the first call."""


def run_processes(
    function: Callable[..., Any], count: int, *arguments: Any, seconds: int = SECONDS
) -> list[Any]:
    """Run `function(*arguments)` in `count` processes with the variables that torchrun sets; return what each
    returned.

    Raises:
        AssertionError: a process failed, or did not end in time; the message has its traceback.
    """
    # a Mac's frameworks do not survive a fork
    context = mp.get_context("spawn" if sys.platform == "darwin" else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"rank-{rank}.pt" for rank in range(count)]
        processes = [
            context.Process(
                target=_run, args=(file, rank, count, store.port, function, arguments), daemon=True
            )
            for rank, file in enumerate(files)
        ]
        until = time.monotonic() + seconds
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        results = [_result(file, process.exitcode) for file, process in zip(files, processes, strict=True)]
    failures = [(rank, result.text) for rank, result in enumerate(results) if isinstance(result, _Failure)]
    assert not failures, "\n".join(f"rank {rank} failed:\n{text}" for rank, text in failures)
    return results


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, seconds: int = SECONDS) -> list[Any]:
    """Run `function(*arguments)` as `run_processes` does, in processes that gloo has joined."""
    return run_processes(_run_joined, ranks, seconds / 2, function, arguments, seconds=seconds)


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _result(file: Path, exit_code: int | None) -> Any:
    result = torch.load(file, weights_only=False) if file.exists() else None  # our own, of a moment ago
    if exit_code and not isinstance(result, _Failure):
        return _Failure(f"it ended with code {exit_code}, or was killed after the time limit")
    return result


def _run(
    file: Path, rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    try:
        result = function(*arguments)
    except BaseException:
        result = _Failure(traceback.format_exc())
    partial = file.with_suffix(".partial")
    torch.save(result, partial)
    partial.rename(file)


def _run_joined(gloo_seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=gloo_seconds))
    return function(*arguments)

"""Several processes that run the same function of a test, with an end to their time."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

SECONDS = 100
PRELOADED = ["longshort.distributed", "longshort.training.loop", "pytest", "transformers"]
"""Modules that a server imports once for all processes, since importing them takes longer than most tests.
The processes inherit its environment, which is that of the first call."""


def run_processes(
    function: Callable[..., Any], count: int, *arguments: Any, seconds: int = SECONDS
) -> list[Any]:
    """Run `function(*arguments)` in processes with the environment that torchrun gives to one machine's.

    Returns what each of the `count` processes returned.

    Raises:
        AssertionError: a process failed, or did not end in time; the message has its traceback.
    """
    # a Mac's frameworks do not survive a fork
    context = mp.get_context("spawn" if sys.platform == "darwin" else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        results = [Path(folder) / f"rank-{rank}.pt" for rank in range(count)]
        port = _free_port()
        processes = [
            context.Process(target=_run, args=(file, rank, count, port, function, arguments), daemon=True)
            for rank, file in enumerate(results)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        for process in processes:
            if process.is_alive():
                process.kill()
        returned = [_returned(file, seconds) for file in results]
    failures = [
        f"rank {rank} failed:\n{x.text}" for rank, x in enumerate(returned) if isinstance(x, _Failure)
    ]
    assert not failures, "\n".join(failures)
    return returned


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, seconds: int = SECONDS) -> list[Any]:
    """Run `function(*arguments)` as `run_processes` does, in processes that gloo has joined."""
    with TemporaryDirectory() as folder:  # a store that outlives the process of rank 0
        store = str(Path(folder) / "store")
        return run_processes(_run_joined, ranks, store, ranks, seconds, function, arguments, seconds=seconds)


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _returned(file: Path, seconds: int) -> Any:
    if not file.exists():
        return _Failure(f"it did not end in {seconds} s, or was killed")
    return torch.load(file, weights_only=False)  # our own, of a moment ago


def _run(
    file: Path, rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    try:
        result = function(*arguments)
    except BaseException:
        result = _Failure(traceback.format_exc())
    partial = file.with_suffix(".partial")
    torch.save(result, partial)
    partial.rename(file)


def _run_joined(
    store: str, ranks: int, seconds: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    dist.init_process_group(
        "gloo", store=FileStore(store, ranks), rank=int(os.environ["RANK"]), world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    return function(*arguments)

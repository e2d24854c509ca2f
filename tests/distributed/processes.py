"""Several processes that run the same function of a test, joined by gloo, with an end to their time."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

SECONDS = 100
PRELOADED = ["longshort.distributed", "longshort.model", "pytest", "transformers"]
"""Modules that a server imports once for all processes, since importing them takes longer than most tests.
The processes inherit its environment, which is that of the first call."""


def run_ranks(
    function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, seconds: int = SECONDS
) -> list[Any]:
    """Run `function(*arguments)` in `ranks` processes of one group; return what each returned.

    Raises:
        AssertionError: a process failed, or did not end in time; the message has its traceback.
    """
    # a Mac's frameworks do not survive a fork
    context = mp.get_context("spawn" if sys.platform == "darwin" else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [
        context.Process(target=_run, args=(function, rank, ranks, folder, arguments, seconds), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    for process in processes:
        if process.is_alive():
            process.kill()
    results = []
    for rank in range(ranks):
        path = folder / f"rank-{rank}.pt"
        result = _Failure(f"it did not end in {seconds} s, or was killed")
        if path.exists():
            result = torch.load(path, weights_only=False)  # our own, of a moment ago
        results.append(result)
    failures = [f"rank {rank} failed:\n{x.text}" for rank, x in enumerate(results) if isinstance(x, _Failure)]
    assert not failures, "\n".join(failures)
    return results


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _run(
    function: Callable[..., Any], rank: int, ranks: int, folder: Path, arguments: Any, seconds: int
) -> None:
    torch.set_num_threads(1)
    store = FileStore(str(folder / "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )
    try:
        result = function(*arguments)
    except BaseException:
        result = _Failure(traceback.format_exc())
    partial = folder / f".rank-{rank}.pt"
    torch.save(result, partial)
    partial.rename(folder / f"rank-{rank}.pt")

"""What every benchmark shares: the machine's name and peak, and a CSV that is whole or called partial."""

from __future__ import annotations

import csv
import os
import platform
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longshort.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_MATMUL_SIZE = 1024


@cache
def processor_name() -> str:
    """The processor's model, as exactly as this system tells it without asking for rights."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine() or "unknown processor"


def measure_peak(threads: int) -> tuple[float, str]:
    """Peak of so many threads right now, in float32 operations per second, and how it was found.

    "fma": fused multiply-adds from registers on one core, times the threads that have a core of their own.
    "matmul": torch's product of two matrices of 1024 × 1024 on torch's present number of threads, which stays
    somewhat below the peak; where the C++ kernels are not built.
    """
    one_core = cpu.fma_peak()
    if one_core is not None:
        return one_core * min(threads, os.cpu_count() or threads), "fma"
    a, b = torch.ones(2, _MATMUL_SIZE, _MATMUL_SIZE)
    seconds = stopwatch(lambda: torch.mm(a, b))[0 if threads == 1 else 1]
    return 2 * _MATMUL_SIZE**3 / seconds, "matmul"


def stopwatch(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds that one run takes: of CPU time, summed over threads, and of wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


@contextmanager
def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that writes a row; at the end the file gets its name, and an older one goes.

    Until then, and after a failure, the rows so far are in `partial_name(path)`; without a row nothing stays.
    """
    partial = partial_name(path)
    is_empty = True
    try:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()

            def write(row: Mapping[str, Any]) -> None:
                nonlocal is_empty
                is_empty = False
                writer.writerow(row)
                file.flush()

            yield write
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if is_empty:
            partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f"{path.name}.partial")

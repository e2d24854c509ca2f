"""What every benchmark shares: the machine's name, peak and free memory, remarks on what was left out, and a
CSV that is whole or called partial."""

from __future__ import annotations

import csv
import os
import platform
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from longshort.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_MATMUL_SIZE = 1024


class Remark(NamedTuple):
    """What is to be known of a provider in a setting: why it was left out, or what its time leaves out."""

    provider: str
    setting: object
    text: str


def summary(title: str, remarks: Sequence[Remark]) -> list[str]:
    """Lines that say each remark of a provider once, and in which or how many settings it was made."""
    settings: dict[tuple[str, str], list[object]] = {}
    for remark in remarks:
        settings.setdefault((remark.provider, remark.text), []).append(remark.setting)
    lines = [
        f"  {provider}: {text} ({where[0] if len(where) == 1 else f'{len(where)} settings'})"
        for (provider, text), where in settings.items()
    ]
    return [f"\n{title}:", *lines] if lines else []


def five_digits(value: float) -> float:
    """Rounded to five significant digits."""
    return float(f"{value:.5g}")


@cache
def processor_name() -> str:
    """The processor's model, as exactly as this system tells it without asking for rights."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine() or "unknown processor"


def machine_name() -> str:
    """torch, its vector instructions, and the processor, in a line."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor_name()}"


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still give, as its system tells; without /proc all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


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


def check_out(out: Path, overwrite: bool) -> None:
    """Raises unless a CSV file may be made there, and its plot, a .png of the same name, beside it.

    Raises:
        FileExistsError: a file of these exists and `overwrite` is not set, or is a folder.
        FileNotFoundError: there is no folder for them.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no folder {str(out.parent)!r}")
    for file in (out, out.with_suffix(".png"), partial_name(out)):
        if file.is_dir():
            raise FileExistsError(f"--out: {file} is a folder; it stays as it is")
        if file.exists() and not overwrite:
            raise FileExistsError(f"--out: {file} exists; --overwrite replaces it")

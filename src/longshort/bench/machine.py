"""The machine that is measured: its name, its peak, its free memory, and its clocks."""

from __future__ import annotations

import os
import platform
import statistics
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longshort.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Callable

_MATMUL_SIZE = 1024
_GPU_MATMUL_SIZE = 8192
_COPIED_BYTES = 2**30
_ENOUGH_SECONDS, _MOST_CALLS = 0.1, 20  # of a turn on a GPU
_CPU = torch.device("cpu")


@cache
def processor_name() -> str:
    """Return the processor's model, as exactly as this system reports it to an ordinary user."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine() or "unknown processor"


def machine_name(device: torch.device = _CPU) -> str:
    """Describe torch, and the GPU or the vector instructions and the processor, in a line."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor_name()}"


def machine_columns(device: torch.device = _CPU) -> dict[str, str | None]:
    """Return the columns of results that describe the machine; `accelerator` is the GPU, None on a CPU."""
    return {
        "torch_version": torch.__version__,
        "transformers_version": _version("transformers"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed, since attention alone needs few."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def free_memory(device: torch.device) -> int:
    """Return the free memory of the device in bytes; on a system without /proc, all its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def measure_peak(threads: int) -> tuple[float, str]:
    """Measure the present peak of some threads, in float32 operations per second; returns the method, too.

    "fma": fused multiply-adds from registers on one core, times the number of threads, at most one per core.
    "matmul": torch's product of two matrices of 1024 × 1024 on torch's present number of threads, which stays
    somewhat below the peak; used if the C++ kernels are not built.
    """
    one_core = cpu.fma_peak()
    if one_core is not None:
        return one_core * min(threads, os.cpu_count() or threads), "fma"
    a, b = torch.ones(2, _MATMUL_SIZE, _MATMUL_SIZE)
    seconds = stopwatch(lambda: torch.mm(a, b))[0 if threads == 1 else 1]
    return 2 * _MATMUL_SIZE**3 / seconds, "matmul"


def measure_gpu_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of torch's product of two matrices of 8192 × 8192 on a GPU now."""
    a, b = torch.ones(2, _GPU_MATMUL_SIZE, _GPU_MATMUL_SIZE, device=device, dtype=dtype)
    return 2 * _GPU_MATMUL_SIZE**3 / device_seconds(lambda: torch.mm(a, b), device)


def measure_copy_rate(device: torch.device) -> float:
    """Measure the bytes per second that a GPU reads and writes while it copies a GiB."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / device_seconds(lambda: target.copy_(source), device)


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Measure one run on a GPU in seconds, between two events on its stream.

    A first run warms up and sets how many runs follow it back to back, in about 0.1 s and at most 20. The
    result is their median; of runs that take longer it is the first one's time.
    """
    first = _event_seconds(run, 1, device)[0]
    calls = min(_MOST_CALLS, int(_ENOUGH_SECONDS / max(first, 1e-9)))
    return statistics.median(_event_seconds(run, calls, device)) if calls else first


def _event_seconds(run: Callable[[], object], calls: int, device: torch.device) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    with torch.cuda.device(device):
        for begin, end in pairs:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def stopwatch(run: Callable[[], object]) -> tuple[float, float]:
    """Measure one run in seconds of CPU time, summed over threads, and of wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def clock_name(threads: int) -> str:
    """Name the clock that `quiet_seconds` reads."""
    return "CPU time" if threads == 1 else "wall time"


def quiet_seconds(run: Callable[[], object], threads: int) -> float:
    """Measure one run on a CPU in seconds: of CPU time with one thread, which other programs disturb least,
    and of wall time with more, whose CPU time includes waiting."""
    return stopwatch(run)[0 if threads == 1 else 1]


def wall_seconds(run: Callable[[], object], device: torch.device = _CPU) -> float:
    """Measure the wall time of one run in seconds, on a GPU from an idle device until its work is done."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def finish() -> None:
        run()
        wait()

    wait()
    return stopwatch(finish)[1]


def count_threads(threads: int) -> str:
    """Return "1 thread" or, for example, "2 threads"."""
    return "1 thread" if threads == 1 else f"{threads} threads"

"""Memory that a prompt takes in whole language models: provider × length, each in a process of its own.

Measured is how much the peak of resident memory rises while the prompt goes through: on Linux VmHWM of
/proc/self/status, elsewhere ru_maxrss, on a GPU the most that torch's allocator held. The model, the tokens
and what a first short prompt leaves are in memory before.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from longshort.bench.benchmarking import Remark, five_digits
from longshort.bench.inference_plot import plot_inference
from longshort.bench.inference_providers import prepare_provider
from longshort.bench.inference_results import (
    Column,
    InferenceResults,
    Row,
    as_table,
    common_columns,
    groups_in_memory,
    measure_sweep,
    suitable_providers,
)
from longshort.bench.inference_settings import MemorySettings
from longshort.bench.speed_plot import Point
from longshort.evaluation.generation import cache_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_SHORT_PROMPT = 32
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class MemoryRow(Row):
    """One provider at one length.

    Attributes:
        peak_before, peak_bytes: peak of memory before the prompt and after it.
        increment_bytes: how much it rose.
        cache_bytes: keys and values afterwards, which are part of it.
        increment_by_mhsa, increment_by_gpt2: increment / that of mhsa or gpt2; None without them.
    """

    peak_before: int
    peak_bytes: int
    increment_bytes: int
    cache_bytes: int
    increment_by_mhsa: float | None
    increment_by_gpt2: float | None


class Peaks(NamedTuple):
    """Bytes that the process of one provider and length tells; and whether an older peak was forgotten."""

    before: int
    after: int
    cache: int
    parameters: int
    forgotten: bool


_COLUMNS = (
    Column("MiB", "increment_bytes", ",.1f", 2.0**-20),
    Column("cache MiB", "cache_bytes", ",.1f", 2.0**-20),
    Column("/ mhsa", "increment_by_mhsa", ".3f"),
    Column("/ gpt2", "increment_by_gpt2", ".3f"),
    Column("process MiB", "peak_bytes", ",.0f", 2.0**-20),
)


def measure_memory(
    settings: MemorySettings, show: Callable[[str], None] = lambda _text: None
) -> InferenceResults[MemoryRow]:
    """Measures all lengths; arguments, files and errors as of `measure_sweep`."""

    def measure(length: int, skipped: list[Remark]) -> list[MemoryRow]:
        return _measure_length(settings, length, skipped)

    def describe(rows: list[MemoryRow]) -> list[str]:
        return as_table(rows, _COLUMNS)

    return measure_sweep(settings, MemoryRow, measure, describe, _plot, show)


def peaks_of(settings: MemorySettings) -> Peaks:
    """Those of the first provider at the first length, in this process, which should be fresh."""
    provider = prepare_provider(settings.providers[0], settings.config())
    length, device = settings.sweep()[0], settings.torch_device
    torch.set_num_threads(settings.num_threads)
    model = provider.build(device, settings.torch_dtype)
    generator = torch.Generator(device).manual_seed(0)
    shape = (settings.batch, length)
    tokens = torch.randint(settings.config().vocab_size, shape, generator=generator, device=device)
    with torch.no_grad():
        model(tokens[:, :_SHORT_PROMPT], use_cache=True, logits_to_keep=1)
        forgotten = _forget_peak(device)
        before = _peak(device)
        out = model(tokens, use_cache=True, logits_to_keep=1)
        after = _peak(device)
    return Peaks(before, after, cache_bytes(out.past_key_values), model.num_parameters(), forgotten)


def _measure_length(settings: MemorySettings, length: int, skipped: list[Remark]) -> list[MemoryRow]:
    setting, sizes = settings.describe(length), (length, settings.batch, settings.torch_dtype)
    providers = suitable_providers(settings, setting, skipped)
    need = {
        name: provider.weight_bytes(settings.torch_dtype)
        + provider.kv_bytes(*sizes)
        + provider.working_bytes(*sizes, settings.torch_device)
        for name, provider in providers.items()
    }
    _, alone = settings.memory_limits()
    groups = groups_in_memory(
        providers,
        lambda names: max((need[name] for name in names), default=0),
        (alone, alone),
        setting,
        skipped,
    )
    peaks = {}
    for name in (name for group in groups for name in group):
        try:
            peaks[name] = _peaks_of_process(settings, name, length)
        except ChildProcessError as error:
            skipped.append(Remark(name, setting, str(error)))
            continue
        if not peaks[name].forgotten:
            text = f"what an older, higher peak hides of the rise, since {_CLEAR} cannot be written"
            skipped.append(Remark(name, setting, text))
    rises = {name: found.after - found.before for name, found in peaks.items()}

    def share(name: str, reference: str) -> float | None:
        return five_digits(rises[name] / rises[reference]) if rises.get(reference) else None

    return [
        MemoryRow(
            **common_columns(settings, name, length, found.parameters),
            peak_before=found.before,
            peak_bytes=found.after,
            increment_bytes=rises[name],
            cache_bytes=found.cache,
            increment_by_mhsa=share(name, "mhsa"),
            increment_by_gpt2=share(name, "gpt2"),
        )
        for name, found in peaks.items()
    ]


def _peaks_of_process(settings: MemorySettings, name: str, length: int) -> Peaks:
    values = asdict(settings) | {
        "providers": [name], "lengths": [length], "threads": settings.num_threads, "out": None,
    }  # fmt: skip
    command = [sys.executable, "-m", "longshort.bench.inference_memory", json.dumps(values)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode < 0:
        raise ChildProcessError(f"its process was ended by signal {-result.returncode}: out of memory?")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["without a word"]
        raise ChildProcessError(f"its process failed: {lines[-1]}")
    return Peaks(**json.loads(result.stdout))


def _forget_peak(device: torch.device) -> bool:
    """Let the peak be what is in memory now; whether the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _plot(rows: list[MemoryRow], file: Path) -> None:
    rises = [max(row.increment_bytes, 1) / 2**20 for row in rows]  # on a logarithmic axis
    points = [Point(row.length, rise, rise, rise) for row, rise in zip(rows, rises, strict=True)]
    plot_inference(rows, points, "Memory that a prompt adds to the peak", "MiB", file)


def _main() -> None:
    values = json.loads(sys.argv[1])
    values |= {name: tuple(values[name]) for name in ("providers", "lengths")}
    print(json.dumps(peaks_of(MemorySettings(**values))._asdict()))


if __name__ == "__main__":
    _main()

"""Memory that a prompt takes in whole language models: provider × length, each in a separate process.

The benchmark measures how much the peak of resident memory rises while the prompt is read: on Linux VmHWM of
/proc/self/status, elsewhere ru_maxrss, on a GPU the peak of torch's allocator. The model, the tokens and
whatever a first short prompt leaves are in memory before.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from annotated_types import Ge

from longshort.bench.benchmark import Case, LeaveOut, Note, Turn, UnsuitableError
from longshort.bench.model_benchmark import ModelBenchmark
from longshort.bench.model_providers import BASELINES, Provider
from longshort.bench.record import Column, in_same_round
from longshort.evaluation.generation import cache_bytes
from longshort.huggingface.cache_name import CACHE_NAME

if TYPE_CHECKING:
    import pandas as pd

_SHORT_PROMPT = 32
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryBenchmark(ModelBenchmark):
    """Measure how much a prompt adds to the peak of memory, each provider and length in a separate process.

    The models are language models of equal size with random weights.
    """

    name = "memory"
    title = "Memory that a prompt adds to the peak"
    y_label = "MiB"
    table = (
        Column("MiB", "increment_bytes", ",.1f", 2.0**-20),
        Column("cache MiB", "cache_bytes", ",.1f", 2.0**-20),
        Column("/ mhsa", "increment_by_mhsa", ".3f"),
        Column("/ gpt2", "increment_by_gpt2", ".3f"),
        Column("process MiB", "peak_bytes", ",.0f", 2.0**-20),
    )
    warm_up = 0
    rounds = 1

    providers: tuple[str, ...] = ("ls", "mhsa", "gpt2")
    """ls, the model with local and global heads; mhsa, the same with every head global; hybrid, whole layers
    local or global, at equal cost of attention; all three on longshort's own kernels; on PyTorch's SDPA
    gpt2, transformers' GPT-2, and mistral, transformers' Mistral, which sees no further than its window."""

    preset: str = "tiny"
    """Shape of the models: tiny, paper-small, paper-base, paper-large, or a JSON file. Weights are random."""

    lengths: tuple[Annotated[int, Ge(1)], ...] | None = (16_384, 32_768, 65_536)
    """Tokens per sequence."""

    def memory_of(self, provider: Provider, length: int) -> tuple[int, int]:
        sizes = (length, self.batch, self.torch_dtype)
        working = provider.working_bytes(*sizes, self.torch_device)
        return 0, provider.weight_bytes(self.torch_dtype) + provider.kv_bytes(*sizes) + working

    def groups(self, case: Case, leave_out: LeaveOut) -> list[list[str]]:
        """Make one group, since each provider has its process to itself."""
        fitting = [name for group in super().groups(case, leave_out) for name in group]
        return [fitting] if fitting else []

    def inputs(self, case: Case, group: Sequence[str]) -> None:
        """Make nothing: each process makes its inputs itself."""

    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        return partial(self._take_turn, case.x, provider, note)

    def _take_turn(self, length: int, provider: str, note: Note) -> dict[str, float]:
        found = _peaks_of_process(self, provider, length)
        if not found.forgotten:
            note(f"an older, higher peak hides a part of the rise, since {_CLEAR} cannot be written")
        return {
            "increment_bytes": found.after - found.before,
            "peak_before": found.before,
            "peak_bytes": found.after,
            "cache_bytes": found.cache,
            "parameters": found.parameters,
        }

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        rise = "increment_bytes"
        for reference in BASELINES:
            rounds[f"increment_by_{reference}"] = rounds[rise] / in_same_round(rounds, rise, reference)
        return rounds


class Peaks(NamedTuple):
    """The bytes that the process of one provider and length reports, and whether the older peak was reset."""

    before: int
    after: int
    cache: int
    parameters: int
    forgotten: bool


def peaks_of(benchmark: MemoryBenchmark) -> Peaks:
    """Measure the first provider at the first length, in this process, which should be fresh."""
    provider = benchmark.provider(benchmark.providers[0])
    length, device = benchmark.sweep()[0], benchmark.torch_device
    torch.set_num_threads(benchmark.num_threads)
    model = provider.build(device, benchmark.torch_dtype)
    generator = torch.Generator(device).manual_seed(0)
    shape = (benchmark.batch, length)
    tokens = torch.randint(benchmark.config().vocab_size, shape, generator=generator, device=device)
    with torch.no_grad():
        model(tokens[:, :_SHORT_PROMPT], use_cache=True, logits_to_keep=1)
        forgotten = _forget_peak(device)
        before = _peak(device)
        out = model(tokens, use_cache=True, logits_to_keep=1)
        after = _peak(device)
    return Peaks(before, after, cache_bytes(getattr(out, CACHE_NAME)), model.num_parameters(), forgotten)


def _peaks_of_process(benchmark: MemoryBenchmark, name: str, length: int) -> Peaks:
    values = asdict(benchmark) | {
        "providers": [name], "lengths": [length], "threads": benchmark.num_threads, "out": None,
    }  # fmt: skip
    command = [sys.executable, "-m", "longshort.bench.memory", json.dumps(values)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode < 0:
        raise UnsuitableError(f"its process was ended by signal {-result.returncode}: out of memory?")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise UnsuitableError(f"its process failed: {lines[-1]}")
    return Peaks(**json.loads(result.stdout))


def _forget_peak(device: torch.device) -> bool:
    """Reset the peak to the memory in use now; return whether the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> int:
    """Return the peak so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _main() -> None:
    values = json.loads(sys.argv[1])
    values |= {name: tuple(values[name]) for name in ("providers", "lengths")}
    print(json.dumps(peaks_of(MemoryBenchmark(**values))._asdict()))


if __name__ == "__main__":
    _main()

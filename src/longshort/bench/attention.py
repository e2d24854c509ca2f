"""Speed of attention: provider × length × layout × dtype × threads × pass.

GFLOP/s count only the work on visible pairs of the provider's layout, whatever else is computed: 4·head_dim
operations a pair forward (two products), 14·head_dim forward and backward (seven). Their share of the
machine's peak, which is measured in the same rounds, can be compared across machines. On a GPU the peak is
torch's product of two large matrices of the same dtype, and the bytes of q, k, v and out, each moved once in
the forward pass, are compared with the rate at which a large tensor is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Gt

from longshort.bench.attention_providers import BASELINE, ON_GPU, PROVIDERS, AttentionInputs, prepare
from longshort.bench.benchmark import (
    Benchmark,
    Case,
    Note,
    Turn,
    UnsuitableError,
    require_among,
    require_device,
)
from longshort.bench.machine import (
    clock_name,
    count_threads,
    device_seconds,
    machine_name,
    measure_copy_rate,
    measure_gpu_peak,
    measure_peak,
    stopwatch,
)
from longshort.bench.record import Column, in_same_round
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

PASSES = {"forward": 4, "forward-backward": 14}
"""The operations of each pass per visible pair and element of head_dim."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
"""Dtypes by name."""


@dataclass(frozen=True)
class LayoutBenchmark(Benchmark):
    """The flags of benchmarks of attention alone: shapes, dtypes and layouts."""

    baseline = BASELINE
    defaults: ClassVar[Mapping[str, Mapping[str, tuple]]] = {
        "cpu": {"lengths": (2048, 8192), "dtypes": ("float32",)},
        "cuda": {"lengths": tuple(2**k for k in range(11, 18)), "dtypes": ("bfloat16",)},
    }
    """The values of flags that are None, by device."""

    device: str = "cpu"
    """cpu or cuda."""

    lengths: tuple[Annotated[int, Ge(1)], ...] | None = None
    """Tokens per sequence. None: 2048 and 8192; on a GPU the powers of two from 2048 to 131072."""

    heads: Annotated[int, Ge(1)] = 12
    """Query heads."""

    global_heads: tuple[Annotated[int, Ge(0)], ...] = (1,)
    """Number of query heads that are global."""

    window: tuple[Annotated[int, Ge(1)], ...] = (100,)
    """Keys that a query of a local head sees, itself included."""

    kv_heads: Annotated[int, Ge(1)] | None = None
    """Key/value heads. None: one per query head."""

    head_dim: Annotated[int, Ge(1)] = 64
    """Width of a head."""

    batch: Annotated[int, Ge(1)] = 1
    """Sequences."""

    dtypes: tuple[str, ...] | None = None
    """float32, bfloat16, float16 or float64. None: float32; on a GPU bfloat16."""

    threads: tuple[Annotated[int, Ge(1)], ...] = (1,)
    """CPU threads."""

    def __post_init__(self) -> None:
        require_device(self.device)
        for name, value in self.defaults[self.device].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the dataclass is frozen
        super().__post_init__()
        require_among("--dtypes", self.dtypes or (), DTYPES)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"--kv-heads must divide --heads ({self.heads}), got {self.kv_heads}")
        group_size = self.heads // (self.kv_heads or self.heads)
        for count in self.global_heads:
            if count > self.heads:
                raise ValueError(f"--global-heads must be at most --heads ({self.heads}), got {count}")
            if count % group_size:
                raise ValueError(
                    f"--global-heads must be a multiple of the {group_size} heads that share a key/value "
                    f"head, got {count}"
                )

    def cases_of(self, variants: Iterable[str], column: str) -> list[Case]:
        """Make a case, with columns, for each length, layout, dtype, number of threads and variant."""
        layouts = [
            HeadLayout.split(self.heads, count, window, self.kv_heads)
            for count, window in product(self.global_heads, self.window)
        ]
        dtypes, lengths = self.dtypes or (), self.lengths or ()
        points = dict.fromkeys(product(dtypes, self.threads, layouts, lengths, variants))
        cases = []
        for dtype, threads, layout, length, variant in points:
            on_cpu = (count_threads(threads), clock_name(threads))
            where = on_cpu if self.device == "cpu" else (self.device,)
            words = (describe_layout(layout), dtype, *where, variant)
            columns = {
                "heads": layout.num_heads,
                "global_heads": len(layout.global_heads),
                "window": next((window for window in layout.windows if window is not None), None),
                "kv_heads": layout.num_kv_heads,
                "head_dim": self.head_dim,
                "batch": self.batch,
                "dtype": dtype,
                "threads": threads,
                "device": self.device,
                column: variant,
            }
            cases.append(Case(length, ", ".join(words), threads, columns))
        return cases

    @property
    def torch_device(self) -> torch.device:
        """The device of the providers."""
        return torch.device(self.device)

    def generator(self) -> torch.Generator:
        """Return a source of random numbers on the device, the same each time."""
        return torch.Generator(self.torch_device).manual_seed(0)

    def random(self, case: Case, generator: torch.Generator, heads: int, tokens: int) -> Tensor:
        """Draw normal numbers, (batch, heads, tokens, head_dim)."""
        shape = (self.batch, heads, tokens, self.head_dim)
        numbers = torch.randn(shape, generator=generator, device=self.torch_device)
        return numbers.to(DTYPES[case.columns["dtype"]])


@dataclass(frozen=True)
class AttentionBenchmark(LayoutBenchmark):
    """Time ways to compute attention, in turns, for each combination of the flags that take several values.

    Milliseconds are CPU time on one thread, wall time on more, and on a GPU the time between two events, a
    median over calls back to back. The speedup is over sdpa, whose heads are all global. GFLOP/s count the
    work on visible pairs alone, also as a share of the peak, which is measured in the same rounds; on a GPU
    GB/s count q, k, v and out once, also as a share of the rate of a copy.
    """

    name = "attention"
    title = "Time of attention"
    known = tuple(PROVIDERS)
    table = (
        Column("ms", "milliseconds", ".2f"),
        Column("10 %", "milliseconds", ".2f", at="p10"),
        Column("90 %", "milliseconds", ".2f", at="p90"),
        Column("speedup", "speedup", ".2f"),
        Column("GFLOP/s", "gflops", ".1f"),
        Column("of peak", "peak_share", ".0%"),
    )

    on_gpu: ClassVar = (
        Column("ms", "milliseconds", ".3f"),
        Column("90 %", "milliseconds", ".3f", at="p90"),
        Column("speedup", "speedup", ".2f"),
        Column("TFLOP/s", "gflops", ".1f", 1e-3),
        Column("of peak", "peak_share", ".0%"),
        Column("GB/s", "gigabytes_per_second", ",.0f"),
        Column("of a copy", "copy_share", ".0%"),
    )
    defaults: ClassVar = {
        "cpu": {**LayoutBenchmark.defaults["cpu"], "providers": ("cpu", "blockwise", BASELINE)},
        "cuda": {**LayoutBenchmark.defaults["cuda"], "providers": ON_GPU},
    }

    providers: tuple[str, ...] | None = None
    """cpu (where it is built), triton, blockwise or reference, the library's backends; cpu-statistics and
    triton-statistics, with the statistics that monitors need; sdpa, PyTorch's attention with every head
    global; sdpa-flash, sdpa-cudnn, sdpa-efficient and sdpa-math, the same by one of its kernels; sdpa-masked,
    with the layout as a mask; flex, compiled FlexAttention, on a CPU forward alone; varlen, PyTorch's
    varlen_attn by groups of heads; local-attention and flash-sparse-attn, the packages of those names, the
    first for --global-heads 0. None: cpu, blockwise and sdpa; on a GPU all that run there."""

    passes: tuple[str, ...] = tuple(PASSES)
    """forward or forward-backward."""

    repeats: Annotated[int, Ge(1)] = 5
    """Rounds that are measured, after one for warm-up."""

    max_memory_gib: Annotated[float, Gt(0)] = 4.0
    """Leave out a provider whose arrays of length × length would take more GiB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_among("--passes", self.passes, PASSES)

    @property
    def rounds(self) -> int:
        return self.repeats

    def cases(self) -> list[Case]:
        return self.cases_of(self.passes, "pass")

    def inputs(self, case: Case, group: Sequence[str]) -> tuple[AttentionInputs, Tensor]:
        """Draw the inputs, and the gradient of the output."""
        generator, layout = self.generator(), layout_of(case)
        q, k, v, grad_out = (
            self.random(case, generator, heads, case.x)
            for heads in (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads, layout.num_heads)
        )
        for x in (q, k, v):
            x.requires_grad_(case.columns["pass"] != "forward")
        return AttentionInputs(layout, q, k, v, self.max_memory_gib * 2**30), grad_out

    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        given, grad_out = inputs
        with self._failures_as_runtime_errors():
            kernel = prepare(provider, given)
        if kernel.note is not None:
            note(kernel.note)
        qkv = given.q, given.k, given.v
        pairs = self.batch * kernel.layout.score_count(case.x, case.x)
        forward = case.columns["pass"] == "forward"
        moved = {"bytes_moved": sum(x.nbytes for x in (*qkv, grad_out))} if forward else {}

        def run() -> None:
            if forward:
                with torch.no_grad():
                    kernel.run(*qkv)
            else:
                torch.autograd.grad(kernel.run(*qkv), qkv, grad_out)

        def take_turn() -> dict[str, float]:
            if self.device == "cuda":
                with self._failures_as_runtime_errors():
                    seconds = device_seconds(run, self.torch_device)
                return {"milliseconds": 1e3 * seconds, "visible_pairs": pairs, **moved}
            cpu, wall = (1e3 * seconds for seconds in stopwatch(run))
            one = case.threads == 1  # with more, CPU time counts waiting too
            times = {"milliseconds": cpu, "cpu_milliseconds": cpu} if one else {"milliseconds": wall}
            return {**times, "wall_milliseconds": wall, "visible_pairs": pairs}

        return take_turn

    @contextmanager
    def _failures_as_runtime_errors(self) -> Iterator[None]:
        """On a GPU, where compilers and kernels of others raise what they like, make the driver leave out a
        provider that fails and go on."""
        try:
            yield
        except (UnsuitableError, RuntimeError):
            raise
        except Exception as error:
            if self.device == "cpu":
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.table if self.device == "cpu" else self.on_gpu

    def each_round(self, case: Case) -> dict[str, float]:
        if self.device == "cuda":
            peak = measure_gpu_peak(self.torch_device, DTYPES[case.columns["dtype"]])
            return {"matmul_peak": peak / 1e9, "copy_rate": measure_copy_rate(self.torch_device) / 1e9}
        peak, kind = measure_peak(case.threads)
        return {f"{kind}_peak": peak / 1e9}

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        milliseconds = rounds["milliseconds"]
        operations = PASSES[case.columns["pass"]] * self.head_dim * rounds["visible_pairs"]
        gflops = operations / milliseconds / 1e6
        peak = rounds.filter(regex="_peak$").iloc[:, 0]
        speedup = in_same_round(rounds, "milliseconds", BASELINE) / milliseconds
        rounds = rounds.assign(gflops=gflops, speedup=speedup, peak_share=gflops / peak)
        if "bytes_moved" not in rounds:
            return rounds
        rate = rounds["bytes_moved"] / milliseconds / 1e6
        return rounds.assign(gigabytes_per_second=rate, copy_share=rate / rounds["copy_rate"])

    def describe_machine(self) -> str:
        """Describe the machine, and its present peak on each number of threads."""
        if self.device == "cuda":
            return super().describe_machine()
        peaks = []
        for count in dict.fromkeys(self.threads):
            torch.set_num_threads(count)
            measured = [measure_peak(count) for _ in range(4)][1:]  # the first warms up
            peak = np.median([flops for flops, _ in measured]) / 1e9
            peaks.append(f"{peak:,.0f} GFLOP/s on {count_threads(count)} ({measured[0][1]})")
        return f"{machine_name()}, peak {', '.join(peaks)}"


def layout_of(case: Case) -> HeadLayout:
    """Return the layout that the columns of a case describe."""
    heads, global_heads, window, kv_heads = (
        case.columns[name] for name in ("heads", "global_heads", "window", "kv_heads")
    )
    return HeadLayout.split(heads, global_heads, window or 1, kv_heads)


def describe_layout(layout: HeadLayout) -> str:
    """Describe heads by window, in words: "11 heads of window 100, 1 global head"."""
    parts = []
    for group in layout.groups:
        heads = "head" if len(group.heads) == 1 else "heads"
        kind = f"global {heads}" if group.window is None else f"{heads} of window {group.window}"
        parts.append(f"{len(group.heads)} {kind}")
    if layout.group_size > 1:
        parts.append(f"key/value heads: {layout.num_kv_heads}")
    return ", ".join(parts)

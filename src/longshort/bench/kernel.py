"""Speed of attention from one query against long caches: provider × length × layout × dtype × threads.

The caches of all layers are used in turn, so that none of them is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from annotated_types import Ge

from longshort.attention import BACKENDS
from longshort.bench.attention import LayoutBenchmark, layout_of
from longshort.bench.attention_providers import BASELINE, AttentionInputs, all_global, prepare
from longshort.bench.benchmark import Case, Note, Turn
from longshort.bench.machine import device_seconds, quiet_seconds
from longshort.bench.record import Column, in_same_round

if TYPE_CHECKING:
    import pandas as pd

_GLOBAL = "-global"


@dataclass(frozen=True)
class KernelBenchmark(LayoutBenchmark):
    """Time the attention of one query against long caches, in turns.

    Times are of one layer: CPU time on one thread, wall time on more, on a GPU the time between two events.
    The speedup is over sdpa, whose heads are all global. GB/s count the keys and values that the query must
    see.
    """

    name = "kernel"
    title = "Time of one query's attention to a cache"
    y_label = "microseconds"
    known = (BASELINE, *(name + suffix for name in BACKENDS for suffix in ("", _GLOBAL)))
    table = (
        Column("µs", "microseconds", ",.0f"),
        Column("90 %", "microseconds", ",.0f", at="p90"),
        Column("speedup", "speedup", ".2f"),
        Column("GB/s", "gigabytes_per_second", ".1f"),
    )

    defaults: ClassVar = {
        "cpu": {"dtypes": ("float32",), "providers": (BASELINE, "cpu-global", "cpu")},
        "cuda": {"dtypes": ("bfloat16",), "providers": (BASELINE, "triton-global", "triton")},
    }

    providers: tuple[str, ...] | None = None
    """sdpa, PyTorch's attention with every head global; cpu (where it is built), triton, blockwise, reference
    or flex, the library's backends, which do without the kernels of caches; with -global after the name the
    same with every head global. None: sdpa, cpu-global and cpu; on a GPU sdpa, triton-global and triton."""

    lengths: tuple[Annotated[int, Ge(1)], ...] = (32_768,)
    """Keys of a cache."""

    layers: Annotated[int, Ge(1)] = 12
    """Caches that are used in turn."""

    rounds: Annotated[int, Ge(1)] = 7
    """Rounds that are measured, after one for warm-up."""

    def cases(self) -> list[Case]:
        return self.cases_of([f"{self.layers} caches"], "layers")

    def inputs(self, case: Case, group: Sequence[str]) -> list[AttentionInputs]:
        """Draw the query, which all layers share, and each layer's keys and values."""
        generator, layout = self.generator(), layout_of(case)
        q = self.random(case, generator, layout.num_heads, 1)
        k_heads = v_heads = layout.num_kv_heads
        return [
            AttentionInputs(
                layout,
                q,
                self.random(case, generator, k_heads, case.x),
                self.random(case, generator, v_heads, case.x),
                max_bytes=float("inf"),
            )
            for _ in range(self.layers)
        ]

    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        first = inputs[0]
        if provider.endswith(_GLOBAL):
            first = replace(first, layout=all_global(first.layout))
        kernel = prepare(provider.removesuffix(_GLOBAL), first)
        numbers = kernel.layout.score_count(1, case.x) // kernel.layout.group_size * 2 * self.head_dim
        bytes_read = self.batch * first.k.itemsize * numbers

        def attend() -> None:
            for layer in inputs:
                kernel.run(layer.q, layer.k, layer.v)

        @torch.no_grad()
        def take_turn() -> dict[str, float]:
            if self.device == "cuda":
                seconds = device_seconds(attend, self.torch_device)
            else:
                seconds = quiet_seconds(attend, case.threads)
            return {"microseconds": 1e6 * seconds / self.layers, "bytes_read": bytes_read}

        return take_turn

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        microseconds = rounds["microseconds"]
        return rounds.assign(
            speedup=in_same_round(rounds, "microseconds", BASELINE) / microseconds,
            gigabytes_per_second=rounds["bytes_read"] / microseconds / 1e3,
        )

"""What `measure_attention` measures: the flags, and the settings that they make together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longshort.bench.attention_providers import BASELINE, PROVIDERS
from longshort.checks import require_integer
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Iterable

PASSES = {"forward": 4, "forward-backward": 14}
"""By name of a pass its operations per visible pair and element of head_dim."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
"""Dtypes by name."""

DEFAULT_PROVIDERS = ("cpu", "blockwise", BASELINE)


@dataclass(frozen=True)
class SpeedSettings:
    """Time ways to compute attention on this CPU, in turns, for each combination of the flags that take
    several values.

    Milliseconds are CPU time at one thread and wall time at more. The speedup is over sdpa, whose heads are
    all global. GFLOP/s count the work on visible pairs alone, also as a share of the peak, which is measured
    in the same rounds.
    """

    providers: tuple[str, ...] = DEFAULT_PROVIDERS
    """cpu (where it is built), blockwise or reference, the library's backends; sdpa, PyTorch's attention with
    every head global; sdpa-masked, the same with the layout as a mask; flex, compiled FlexAttention, forward
    alone; local-attention, the package of that name, for --global-heads 0."""

    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens per sequence."""

    heads: int = 12
    """Query heads."""

    global_heads: tuple[int, ...] = (1,)
    """How many of them are global."""

    window: tuple[int, ...] = (100,)
    """Keys that a query of a local head sees, itself included."""

    kv_heads: int | None = None
    """Key/value heads. None: one per query head."""

    head_dim: int = 64
    """Width of a head."""

    batch: int = 1
    """Sequences."""

    dtypes: tuple[str, ...] = ("float32",)
    """float32, bfloat16, float16 or float64."""

    threads: tuple[int, ...] = (1,)
    """CPU threads."""

    passes: tuple[str, ...] = tuple(PASSES)
    """forward or forward-backward."""

    repeats: int = 5
    """Rounds that count, after one that warms up."""

    max_memory_gib: float = 4.0
    """Leave out a provider whose arrays of length × length would take more GiB."""

    out: Path | None = None
    """CSV file to make; a plot, a .png of the same name, goes beside it. Until the end the rows are in
    OUT.partial. None: only print."""

    overwrite: bool = False
    """Replace the files of OUT."""

    def __post_init__(self) -> None:
        for flag, chosen, allowed in (
            ("--providers", self.providers, PROVIDERS),
            ("--dtypes", self.dtypes, DTYPES),
            ("--passes", self.passes, PASSES),
        ):
            require_among(flag, chosen, allowed)
        for flag, value in (
            ("--heads", self.heads),
            ("--head-dim", self.head_dim),
            ("--batch", self.batch),
            ("--repeats", self.repeats),
        ):
            require_integer(flag, value, minimum=1)
        for flag, values, minimum in (
            ("--lengths", self.lengths, 1),
            ("--window", self.window, 1),
            ("--threads", self.threads, 1),
            ("--global-heads", self.global_heads, 0),
        ):
            for value in require_any(flag, values):
                require_integer(flag, value, minimum)
        self._check_heads()
        if not 0 < self.max_memory_gib < float("inf"):
            raise ValueError(f"--max-memory-gib must be a number > 0, got {self.max_memory_gib}")
        require_csv("--out", self.out)

    def _check_heads(self) -> None:
        if self.kv_heads is not None:
            require_integer("--kv-heads", self.kv_heads, minimum=1)
            if self.heads % self.kv_heads:
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

    def sweep(self) -> list[Setting]:
        """Each setting once, in the order in which they are measured."""
        layouts = [
            HeadLayout.split(self.heads, count, window, self.kv_heads)
            for count, window in product(self.global_heads, self.window)
        ]
        settings = product(self.dtypes, self.threads, layouts, self.lengths)
        return list(dict.fromkeys(Setting(*values) for values in settings))


@dataclass(frozen=True)
class Setting:
    """What the providers compute while they take turns."""

    dtype: str
    threads: int
    layout: HeadLayout
    length: int

    @property
    def window(self) -> int | None:
        """Window of the local heads; None where every head is global."""
        return next((window for window in self.layout.windows if window is not None), None)

    def __str__(self) -> str:
        layout = describe_layout(self.layout)
        return f"{self.length} tokens, {layout}, {self.dtype}, {count_threads(self.threads)}"


def describe_layout(layout: HeadLayout) -> str:
    """Heads by window, in words: "11 heads of window 100, 1 global head"."""
    parts = []
    for group in layout.groups:
        heads = "head" if len(group.heads) == 1 else "heads"
        kind = f"global {heads}" if group.window is None else f"{heads} of window {group.window}"
        parts.append(f"{len(group.heads)} {kind}")
    if layout.group_size > 1:
        parts.append(f"key/value heads: {layout.num_kv_heads}")
    return ", ".join(parts)


def count_threads(threads: int) -> str:
    """ "1 thread" or "2 threads"."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def require_among(flag: str, chosen: tuple[str, ...], allowed: Iterable[str]) -> None:
    """Raise a ValueError that names the flag unless at least one was chosen, and all are allowed."""
    allowed = tuple(allowed)
    for name in require_any(flag, chosen):
        if name not in allowed:
            raise ValueError(f"{flag} must be among {', '.join(allowed)}, got {name!r}")


def require_csv(flag: str, path: Path | None) -> None:
    """Raise a ValueError that names the flag unless the file is called a CSV, or there is none."""
    if path is not None and path.suffix != ".csv":
        raise ValueError(f"{flag} must end in .csv, got {str(path)!r}")


def require_any(flag: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values; raise a ValueError that names the flag if there are none."""
    if not values:
        raise ValueError(f"{flag} must name at least one, got none")
    return values

"""Shared parts of the commands on pretrained decoders: loading, flags of a search for heads, the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from longshort.checks import check_fields
from longshort.cli.units import parse_bytes
from longshort.conversion.budget import Budget, KeepHeads, LimitCache, LimitRise, parse_share
from longshort.conversion.inspection import Inspection
from longshort.conversion.reports import inspect_into
from longshort.conversion.text import cut_parts, read_tokens
from longshort.data.tokenization import first_token
from longshort.evaluation.positions import position_limit
from longshort.huggingface.loading import DTYPES, Pretrained, load_decoder
from longshort.training.parallel import connect

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

Show = Callable[[str, int, int | None], None]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    text: str = "stdlib"
    """Text to measure on: a file, a folder, or another source of `longshort data`."""

    keep: str | None = None
    """Share of the key/value heads that may see everything. Without this and another budget: 25%."""

    max_rise: Annotated[float, Gt(0)] | None = None
    """Instead of --keep: nats per token by which the loss may rise, with as few global heads as possible."""

    max_cache: str | None = None
    """Instead of --keep: the largest cache of a sequence in bf16, such as 1GiB, at --cache-length tokens."""

    cache_length: Annotated[int, Ge(1)] = 32768
    """Tokens in the cache for which its size is given."""

    window: Annotated[int, Ge(1)] = 128
    """Keys that a query of a local head sees, itself included."""

    sink_tokens: Annotated[int, Ge(0)] = 4
    """Number of first keys that local heads see too."""

    length: Annotated[int, Ge(2)] = 1024
    """Tokens of the windows of text that are measured."""

    windows: tuple[int, int, int] = (2, 4, 4)
    """Windows to rank on, to choose on, and to report on."""

    measure: Literal["gate", "loss"] = "gate"
    """How the cost of a head is estimated: gate takes one pass for all heads, loss one pass for each."""

    dtype: Precision = "auto"
    """Precision of the weights. auto: float32 on a CPU, that of the saved weights on a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    def __post_init__(self) -> None:
        check_fields(self)
        given = [flag for flag in ("keep", "max_rise", "max_cache") if getattr(self, flag) is not None]
        if len(given) > 1:
            raise ValueError("--keep, --max-rise and --max-cache exclude each other, got more than one")
        if self.windows and min(self.windows) < 1:
            raise ValueError(f"--windows must be at least 1 each, got {self.windows}")
        seen = self.window + self.sink_tokens
        if self.length <= seen:
            raise ValueError(
                f"--length must be more than --window + --sink-tokens = {seen}, got {self.length}"
            )
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """The budget that a layout must keep to."""
        if self.max_rise is not None:
            return LimitRise(self.max_rise)
        if self.max_cache is not None:
            size = parse_bytes("--max-cache", self.max_cache)
            return LimitCache(size, self.cache_length, name="--max-cache")
        return KeepHeads(0.25) if self.keep is None else parse_share("--keep", self.keep)


def load_for_evaluation(name: str, device: torch.device, precision: Precision) -> Pretrained:
    """Load a decoder; "auto" is float32 on a CPU, where others are slow, and the saved dtype elsewhere."""
    default = torch.float32 if device.type == "cpu" else None
    return load_decoder(name, dtype=DTYPES.get(precision, default), device=device)


def open_with_text(flags: SearchFlags, model: str, text: str) -> tuple[Pretrained, Int64[Tensor, " tokens"]]:
    """Open a model on the device of the flags, and read the text with its tokenizer."""
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    with connect(flags.device) as ranks:
        pretrained = load_for_evaluation(model, ranks.device, flags.dtype)
    return pretrained, read_tokens(text, pretrained.tokenizer)


def cut_windows(
    flags: SearchFlags, pretrained: Pretrained, text: Int64[Tensor, " tokens"]
) -> list[Int64[Tensor, "count length"]]:
    """Cut the windows of an inspection out of a text.

    Raises:
        ValueError: --length exceeds the model's positions, or the text is too short.
    """
    limit = position_limit(pretrained.model)
    if limit is not None and flags.length > limit:
        raise ValueError(
            f"--length must be at most {limit}, the model's learned positions, got {flags.length}"
        )
    return cut_parts(text, flags.length, flags.windows, first_token(pretrained.tokenizer))


def search_heads(
    flags: SearchFlags,
    model: str,
    pretrained: Pretrained,
    parts: Sequence[Int64[Tensor, "count length"]],
    out: Path,
    show: Show,
) -> Inspection:
    """Inspect the model of that name on windows that `cut_windows` made; results go to a folder."""
    about: dict[str, Any] = {"model": model, "text": flags.text}
    return inspect_into(
        out,
        pretrained,
        parts,
        flags.budget,
        window=flags.window,
        sink_tokens=flags.sink_tokens,
        measure=flags.measure,
        about=about,
        progress=lambda done, total: show("inspecting", round(done), round(total)),
    )

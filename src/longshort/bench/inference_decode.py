"""Speed of decoding by whole language models after a long context: provider × length.

The caches are filled with random keys and values, since a real prompt of this length takes minutes and the
time of a step does not depend on the values. The providers take turns: each round each of them decodes some
tokens one by one, and the context grows by them. The first round warms up. Reported are medians over the
steps of the other rounds; comparisons are medians of the rounds' own ratios.

transformers' caches are its own: `DynamicCache` makes a copy of itself for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from longshort.bench.benchmarking import five_digits
from longshort.bench.inference_plot import plot_inference
from longshort.bench.inference_providers import bytes_of_weights_read
from longshort.bench.inference_results import (
    Column,
    InferenceResults,
    Models,
    Row,
    as_table,
    common_columns,
    failures_told,
    groups_in_memory,
    measure_sweep,
    median_ratio,
    run_rounds,
    suitable_providers,
    wall_seconds,
)
from longshort.bench.speed_plot import Point
from longshort.evaluation.generation import cache_bytes
from longshort.huggingface import SplitCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from longshort.bench.benchmarking import Remark
    from longshort.bench.inference_providers import Provider
    from longshort.bench.inference_settings import DecodeSettings


@dataclass(frozen=True, kw_only=True)
class DecodeRow(Row):
    """One provider after a context of one length. A step gives a token to each sequence.

    Attributes:
        milliseconds, milliseconds_p90: of a step's wall time, median and 90th percentile.
        tokens_per_second: of all sequences together.
        speedup_over_mhsa, speedup_over_gpt2: median over rounds of their time / this; None where they were
            not measured in the same rounds.
        cache_bytes: keys and values of the context.
        bytes_read: that a step must read: the weights but for embedding tables, and the cache.
        gigabytes_per_second: bytes_read by the median of time, in 1e9.
        floor_ratio: bytes_read of mhsa / these: the speedup if reading were all; None without mhsa.
        attention_microseconds: of one layer's attention alone, from queries, keys and values on, median; the
            layers take turns so that none is found in the processor's cache. None but for longshort's own.
        attention_speedup_over_mhsa: of that, likewise; None where mhsa was not measured in the same rounds.
        tokens, rounds: steps in a round, and rounds that counted.
    """

    milliseconds: float
    milliseconds_p90: float
    tokens_per_second: float
    speedup_over_mhsa: float | None
    speedup_over_gpt2: float | None
    cache_bytes: int
    bytes_read: int
    gigabytes_per_second: float
    floor_ratio: float | None = None
    attention_microseconds: float | None
    attention_speedup_over_mhsa: float | None
    tokens: int
    rounds: int


_COLUMNS = (
    Column("ms", "milliseconds", ".2f"),
    Column("90 %", "milliseconds_p90", ".2f"),
    Column("tokens/s", "tokens_per_second", ",.1f"),
    Column("× mhsa", "speedup_over_mhsa", ".2f"),
    Column("× gpt2", "speedup_over_gpt2", ".2f"),
    Column("floor", "floor_ratio", ".2f"),
    Column("cache MiB", "cache_bytes", ",.1f", 2.0**-20),
    Column("GB/s", "gigabytes_per_second", ".1f"),
    Column("attn µs", "attention_microseconds", ",.0f"),
    Column("attn × mhsa", "attention_speedup_over_mhsa", ".2f"),
)


def measure_decode(
    settings: DecodeSettings, show: Callable[[str], None] = lambda _text: None
) -> InferenceResults[DecodeRow]:
    """Measures all lengths; arguments, files and errors as of `measure_sweep`."""
    models, limits = Models(settings), settings.memory_limits()

    def measure(length: int, skipped: list[Remark]) -> list[DecodeRow]:
        return _measure_length(settings, length, models, limits, skipped)

    def describe(rows: list[DecodeRow]) -> list[str]:
        return as_table(rows, _COLUMNS)

    return measure_sweep(settings, DecodeRow, measure, describe, _plot, show)


def _measure_length(
    settings: DecodeSettings,
    length: int,
    models: Models,
    limits: tuple[float, float],
    skipped: list[Remark],
) -> list[DecodeRow]:
    setting, sizes = settings.describe(length), (length, settings.batch, settings.torch_dtype)
    providers = suitable_providers(settings, setting, skipped, settings.room)
    taken = {
        name: provider.weight_bytes(settings.torch_dtype) + provider.kv_bytes(*sizes)
        for name, provider in providers.items()
    }

    def need(names: Sequence[str]) -> float:
        return sum(taken[name] for name in names)

    rows = [
        row
        for group in groups_in_memory(providers, need, limits, setting, skipped)
        for row in _measure_group(settings, length, [providers[name] for name in group], models, skipped)
    ]
    mhsa = next((row.bytes_read for row in rows if row.provider == "mhsa"), None)
    if mhsa is None:
        return rows
    return [replace(row, floor_ratio=five_digits(mhsa / row.bytes_read)) for row in rows]


def _measure_group(
    settings: DecodeSettings,
    length: int,
    group: Sequence[Provider],
    models: Models,
    skipped: list[Remark],
) -> list[DecodeRow]:
    """The rows alone stay: the next group needs the room. `floor_ratio` is still to come."""
    setting, names = settings.describe(length), [provider.name for provider in group]
    models.keep(names)
    decoders: dict[str, _Decoder] = {}
    with failures_told(names, setting, skipped):
        inputs = _inputs(settings)
        for provider in group:
            with failures_told([provider.name], setting, skipped):
                decoders[provider.name] = _decoder(settings, length, provider, models.of(provider), inputs)
    run_rounds(decoders, settings.rounds, setting, skipped)
    return [_row(settings, length, name, decoders) for name in decoders]


@dataclass
class _Decoder:
    """A model, its filled cache, and the seconds that it took.

    Attributes:
        tokens: steps of a round.
        steps: seconds of each step, (rounds, tokens).
        attention: those of attention alone in all layers, by round; none for other caches than ours.
    """

    model: PreTrainedModel
    cache: Cache
    token: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    tokens: int
    cache_bytes: int
    bytes_read: int
    parameters: int
    steps: list[list[float]] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)

    @torch.no_grad()
    def take_turn(self, counts: bool) -> None:
        device, cache = self.model.device, self.cache
        step = partial(self.model, self.token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        steps = [wall_seconds(step, device) for _ in range(self.tokens)]
        if counts:
            self.steps.append(steps)
        if isinstance(cache, SplitCache):

            def attend() -> None:
                for layer in cache.layers:
                    layer.cache.attend(*self.qkv)  # pyright: ignore[reportAttributeAccessIssue]

            seconds = wall_seconds(attend, device)
            if counts:
                self.attention.append(seconds)


def _inputs(settings: DecodeSettings) -> tuple[torch.Generator, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The generator of the caches, a token, and what attention alone gets: the same for all."""
    device, dtype, batch = settings.torch_device, settings.torch_dtype, settings.batch
    generator = torch.Generator(device).manual_seed(0)
    config = settings.config()
    token = torch.randint(config.vocab_size, (batch, 1), generator=generator, device=device)

    def random(heads: int) -> Tensor:
        return torch.randn(
            (batch, heads, 1, config.head_dim), generator=generator, device=device, dtype=dtype
        )

    kv_heads = config.num_key_value_heads
    return generator, token, (random(config.num_attention_heads), random(kv_heads), random(kv_heads))


def _decoder(
    settings: DecodeSettings,
    length: int,
    provider: Provider,
    model: PreTrainedModel,
    inputs: tuple[torch.Generator, Tensor, tuple[Tensor, Tensor, Tensor]],
) -> _Decoder:
    generator, token, qkv = inputs
    cache = provider.filled_cache(model, settings.batch, length, settings.room, generator)
    size = cache_bytes(cache)
    return _Decoder(
        model=model,
        cache=cache,
        token=token,
        qkv=qkv,
        tokens=settings.tokens,
        cache_bytes=size,
        bytes_read=bytes_of_weights_read(model) + size,
        parameters=model.num_parameters(),
    )


def _row(
    settings: DecodeSettings,
    length: int,
    name: str,
    decoders: Mapping[str, _Decoder],
) -> DecodeRow:
    own = decoders[name]
    totals = {other: [sum(steps) for steps in decoder.steps] for other, decoder in decoders.items()}
    median, p90 = np.percentile(1e3 * np.array(own.steps), [50, 90])
    attention = baseline = None
    if own.attention:
        attention = five_digits(1e6 * np.median(own.attention) / settings.config().num_hidden_layers)
        baseline = decoders["mhsa"].attention if "mhsa" in decoders else None
    return DecodeRow(
        **common_columns(settings, name, length, own.parameters),
        milliseconds=five_digits(median),
        milliseconds_p90=five_digits(p90),
        tokens_per_second=five_digits(1e3 * settings.batch / median),
        speedup_over_mhsa=median_ratio(totals.get("mhsa"), totals[name]),
        speedup_over_gpt2=median_ratio(totals.get("gpt2"), totals[name]),
        cache_bytes=own.cache_bytes,
        bytes_read=own.bytes_read,
        gigabytes_per_second=five_digits(own.bytes_read / median / 1e6),
        attention_microseconds=attention,
        attention_speedup_over_mhsa=median_ratio(baseline, own.attention),
        tokens=settings.tokens,
        rounds=settings.rounds,
    )


def _plot(rows: list[DecodeRow], file: Path) -> None:
    points = [Point(row.length, row.milliseconds, row.milliseconds, row.milliseconds_p90) for row in rows]
    plot_inference(rows, points, "Time of a token after a context", "milliseconds", file)

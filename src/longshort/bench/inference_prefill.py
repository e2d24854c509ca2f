"""Speed of the prompt's way through whole language models: provider × length.

The providers take turns: each round runs each of them once, a whole forward pass that fills a cache and gives
the last position's logits, and attention alone beside it. The first round warms up. Reported are medians over
the other rounds; comparisons are medians of the rounds' own ratios.

Amdahl's law bounds what a model can gain by less attention. Where a reference model takes t, of which t_a is
attention, and a model of equal size computes the share s of its visible pairs, the bound is
t - t_a · (1 - s): all else is the same, and attention runs at the reference's own rate, that of longshort's
kernels for `mhsa` and of SDPA for `gpt2`. It may be beaten by a model that has other things faster too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from longshort.bench.benchmarking import five_digits
from longshort.bench.inference_plot import plot_inference
from longshort.bench.inference_providers import BASELINES
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

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from longshort.bench.benchmarking import Remark
    from longshort.bench.inference_providers import Provider
    from longshort.bench.inference_settings import PrefillSettings


@dataclass(frozen=True, kw_only=True)
class PrefillRow(Row):
    """One provider at one length.

    Attributes:
        milliseconds, milliseconds_p90: of wall time, median and 90th percentile.
        tokens_per_second: of all sequences together.
        attention_milliseconds: of attention alone, all layers: one of each kind is timed, on tensors of the
            model's shape.
        attention_share: of the milliseconds; median of the rounds' shares.
        visible_pairs: (query, key) pairs that the provider must compute: all layers, heads and sequences.
        speedup_over_mhsa, speedup_over_gpt2: median over rounds of their time / this; None where they were
            not measured in the same rounds.
        bound_mhsa, bound_gpt2: Amdahl's bound on the milliseconds against each of them; None but for
            longshort's own models with fewer pairs.
        saving_allowed_mhsa, saving_allowed_gpt2: what the bound saves, as a share of their time.
        saving_mhsa, saving_gpt2: what was saved, likewise.
        share_of_allowed_mhsa, share_of_allowed_gpt2: what was saved / what the bound saves.
        rounds: that counted.
    """

    milliseconds: float
    milliseconds_p90: float
    tokens_per_second: float
    attention_milliseconds: float
    attention_share: float
    visible_pairs: int
    speedup_over_mhsa: float | None
    speedup_over_gpt2: float | None
    bound_mhsa: float | None = None
    saving_allowed_mhsa: float | None = None
    saving_mhsa: float | None = None
    share_of_allowed_mhsa: float | None = None
    bound_gpt2: float | None = None
    saving_allowed_gpt2: float | None = None
    saving_gpt2: float | None = None
    share_of_allowed_gpt2: float | None = None
    rounds: int


Times = TypeVar("Times", float, np.ndarray)


def amdahl_bound(total: Times, attention: Times, pairs: int, reference_pairs: int) -> Times:
    """Least time of a model that differs from a reference in its pairs alone (Amdahl, 1967).

    Args:
        total: time of the reference, one or an array of them.
        attention: how much of it is attention, likewise in the same unit.
        pairs, reference_pairs: visible pairs of the model and of the reference.
    """
    return total - attention * (1 - pairs / reference_pairs)


_KERNELS = {"mhsa": "longshort's kernels", "gpt2": "SDPA"}  # of the baselines' attention
_COLUMNS = (
    Column("ms", "milliseconds", ".1f"),
    Column("90 %", "milliseconds_p90", ".1f"),
    Column("tokens/s", "tokens_per_second", ",.0f"),
    Column("attention", "attention_share", ".0%"),
    Column("× mhsa", "speedup_over_mhsa", ".2f"),
    Column("× gpt2", "speedup_over_gpt2", ".2f"),
    Column("parameters", "parameters", ",.0f"),
)


def measure_prefill(
    settings: PrefillSettings, show: Callable[[str], None] = lambda _text: None
) -> InferenceResults[PrefillRow]:
    """Measures all lengths; arguments, files and errors as of `measure_sweep`."""
    models, limits = Models(settings), settings.memory_limits()

    def measure(length: int, skipped: list[Remark]) -> list[PrefillRow]:
        return _measure_length(settings, length, models, limits, skipped)

    return measure_sweep(settings, PrefillRow, measure, _describe, _plot, show)


def _measure_length(
    settings: PrefillSettings,
    length: int,
    models: Models,
    limits: tuple[float, float],
    skipped: list[Remark],
) -> list[PrefillRow]:
    setting, sizes = settings.describe(length), (length, settings.batch, settings.torch_dtype)
    providers = suitable_providers(settings, setting, skipped)
    lasting = {  # from one turn to the next
        name: provider.weight_bytes(settings.torch_dtype) + provider.mask_bytes(length)
        for name, provider in providers.items()
    }
    working = {
        name: provider.kv_bytes(*sizes) + provider.working_bytes(*sizes, settings.torch_device)
        for name, provider in providers.items()
    }
    config = settings.config()
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    shared = settings.batch * length * heads * config.head_dim * settings.torch_dtype.itemsize  # q, k and v

    def need(names: Sequence[str]) -> float:  # one cache at a time
        own = sum(lasting[name] for name in names) + max((working[name] for name in names), default=0)
        return shared + own

    return [
        row
        for group in groups_in_memory(providers, need, limits, setting, skipped)
        for row in _measure_group(settings, length, [providers[name] for name in group], models, skipped)
    ]


def _measure_group(
    settings: PrefillSettings,
    length: int,
    group: Sequence[Provider],
    models: Models,
    skipped: list[Remark],
) -> list[PrefillRow]:
    """The rows alone stay: the next group needs the room."""
    setting, names = settings.describe(length), [provider.name for provider in group]
    models.keep(names)
    passes: dict[str, _Pass] = {}
    with failures_told(names, setting, skipped):
        tokens, qkv = _inputs(settings, length)
        for provider in group:
            with failures_told([provider.name], setting, skipped):
                passes[provider.name] = _pass(settings, provider, models.of(provider), tokens, qkv)
    run_rounds(passes, settings.rounds, setting, skipped)
    return [_row(settings, length, name, passes) for name in passes]


@dataclass
class _Pass:
    """What is timed of one provider, and the seconds that it took.

    Attributes:
        run: the model's forward pass.
        attention: for each kind of layer how many there are, and what runs the attention of one.
        totals, attentions: of each round, of the model and of all its attention.
    """

    run: Callable[[], object]
    attention: list[tuple[int, Callable[[], object]]]
    device: torch.device
    pairs: int
    parameters: int
    is_ours: bool
    totals: list[float] = field(default_factory=list)
    attentions: list[float] = field(default_factory=list)

    @torch.no_grad()
    def take_turn(self, counts: bool) -> None:
        total = wall_seconds(self.run, self.device)
        attention = sum(count * wall_seconds(run, self.device) for count, run in self.attention)
        if counts:
            self.totals.append(total)
            self.attentions.append(attention)


def _inputs(settings: PrefillSettings, length: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Tokens, and what attention alone gets: the same for all."""
    device, dtype, batch = settings.torch_device, settings.torch_dtype, settings.batch
    generator = torch.Generator(device).manual_seed(0)
    config = settings.config()
    tokens = torch.randint(config.vocab_size, (batch, length), generator=generator, device=device)

    def random(heads: int) -> Tensor:
        shape = (batch, heads, length, config.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return tokens, (random(heads), random(kv_heads), random(kv_heads))


def _pass(
    settings: PrefillSettings,
    provider: Provider,
    model: PreTrainedModel,
    tokens: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
) -> _Pass:
    (batch, length), device = tokens.shape, settings.torch_device
    return _Pass(
        run=partial(model, tokens, use_cache=True, logits_to_keep=1),
        attention=[
            (count, partial(provider.attend(layout, length, device), *qkv))
            for layout, count in Counter(provider.layouts).items()
        ],
        device=device,
        pairs=batch * sum(layout.score_count(length, length) for layout in provider.layouts),
        parameters=model.num_parameters(),
        is_ours=provider.is_ours,
    )


def _row(settings: PrefillSettings, length: int, name: str, passes: Mapping[str, _Pass]) -> PrefillRow:
    """Of one of the providers that took turns."""
    own = passes[name]
    totals = {other: timed.totals for other, timed in passes.items()}
    total, attention = 1e3 * np.array(own.totals), 1e3 * np.array(own.attentions)
    median, p90 = np.percentile(total, [50, 90])
    bounds: dict[str, Any] = {}
    for reference in BASELINES:
        if own.is_ours and reference in passes and own.pairs < passes[reference].pairs:
            bounds |= _bound(reference, own, passes[reference])
    return PrefillRow(
        **common_columns(settings, name, length, own.parameters),
        milliseconds=five_digits(median),
        milliseconds_p90=five_digits(p90),
        tokens_per_second=five_digits(1e3 * settings.batch * length / median),
        attention_milliseconds=five_digits(np.median(attention)),
        attention_share=five_digits(np.median(attention / total)),
        visible_pairs=own.pairs,
        speedup_over_mhsa=median_ratio(totals.get("mhsa"), totals[name]),
        speedup_over_gpt2=median_ratio(totals.get("gpt2"), totals[name]),
        rounds=settings.rounds,
        **bounds,
    )


def _bound(name: str, own: _Pass, reference: _Pass) -> dict[str, Any]:
    """Columns of the bound against a reference."""
    total, reference_total, attention = (
        1e3 * np.array(seconds) for seconds in (own.totals, reference.totals, reference.attentions)
    )
    bound = amdahl_bound(reference_total, attention, own.pairs, reference.pairs)
    allowed = np.median(1 - bound / reference_total)
    saved = np.median(1 - total / reference_total)
    return {
        f"bound_{name}": five_digits(np.median(bound)),
        f"saving_allowed_{name}": five_digits(allowed),
        f"saving_{name}": five_digits(saved),
        f"share_of_allowed_{name}": five_digits(saved / allowed),
    }


def _describe(rows: list[PrefillRow]) -> list[str]:
    lines = as_table(rows, _COLUMNS)
    for row in rows:
        for reference in BASELINES:
            bound, allowed, saved, share = (
                getattr(row, f"{name}_{reference}")
                for name in ("bound", "saving_allowed", "saving", "share_of_allowed")
            )
            if bound is not None:
                lines.append(
                    f"  {row.provider} against {reference}: Amdahl's bound, at {reference}'s own rate "
                    f"({_KERNELS[reference]}), is {bound:,.1f} ms, a saving of {allowed:.0%}; saved "
                    f"{saved:.0%}, which is {share:.0%} of what the law allows"
                )
    return lines


def _plot(rows: list[PrefillRow], file: Path) -> None:
    points = [Point(row.length, row.milliseconds, row.milliseconds, row.milliseconds_p90) for row in rows]
    bounds = [
        (row.length, row.bound_mhsa) for row in rows if row.provider == "ls" and row.bound_mhsa is not None
    ]
    plot_inference(rows, points, "Time of a prompt", "milliseconds", file, bounds)

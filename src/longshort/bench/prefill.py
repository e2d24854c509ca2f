"""Speed of reading a prompt by whole language models: provider × length.

A turn is a whole forward pass that fills a cache and computes the last position's logits, and then attention
alone.

Amdahl's law bounds what a model can gain by less attention. If a reference model takes t, of which t_a is
attention, and a model of equal size computes the share s of its visible pairs, the bound is
t - t_a · (1 - s): all else is the same, and attention runs at the reference's rate, that of longshort's
kernels for `mhsa` and of SDPA for `gpt2`. A model whose other parts are faster too may beat it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge

from longshort.bench.benchmark import Case, Note, Turn
from longshort.bench.machine import wall_seconds
from longshort.bench.model_benchmark import ModelBenchmark
from longshort.bench.model_providers import BASELINES, OURS, Provider
from longshort.bench.record import Column, in_same_round
from longshort.bench.sweep import measure

Times = TypeVar("Times", float, np.ndarray, pd.Series)

_ANY_MEMORY = 2.0**40  # GiB: all models take turns in one group, or the machine fails
_KERNELS = {"mhsa": "longshort's kernels", "gpt2": "SDPA"}  # for the baselines' attention


def amdahl_bound(total: Times, attention: Times, pairs: Any, reference_pairs: Any) -> Times:
    """Compute the least time of a model that differs from a reference only in its pairs (Amdahl, 1967).

    Args:
        total: time of the reference, a number or an array.
        attention: the part of it that is attention, in the same unit.
        pairs: visible pairs of the model.
        reference_pairs: visible pairs of the reference.
    """
    return total - attention * (1 - pairs / reference_pairs)


@dataclass(frozen=True)
class PrefillBenchmark(ModelBenchmark):
    """Time whole language models of equal size with random weights, in turns, while they read a prompt.

    Times are wall times. Amdahl's bound is printed for our own models: the time of the model that they are
    compared with, minus the attention that they avoid, at that model's rate.
    """

    name = "prefill"
    title = "Time of a prompt"
    bound = ("Amdahl's bound of ls", "ls", "bound_mhsa")
    table = (
        Column("ms", "milliseconds", ".1f"),
        Column("90 %", "milliseconds", ".1f", at="p90"),
        Column("tokens/s", "tokens_per_second", ",.0f"),
        Column("attention", "attention_share", ".0%"),
        Column("× mhsa", "speedup_over_mhsa", ".2f"),
        Column("× gpt2", "speedup_over_gpt2", ".2f"),
        Column("parameters", "parameters", ",.0f"),
    )

    rounds: Annotated[int, Ge(1)] = 5
    """Rounds that are measured, after one for warm-up."""

    def memory_of(self, provider: Provider, length: int) -> tuple[int, int]:
        config, dtype, sizes = self.config(), self.torch_dtype, (length, self.batch, self.torch_dtype)
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        qkv = self.batch * length * heads * config.head_dim * dtype.itemsize  # for attention alone
        lasting = provider.weight_bytes(dtype) + provider.mask_bytes(length)
        return lasting, qkv + provider.kv_bytes(*sizes) + provider.working_bytes(*sizes, self.torch_device)

    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        described, device = self.provider(provider), self.torch_device
        model = self.models.of(described)
        run = partial(model, inputs.tokens, use_cache=True, logits_to_keep=1)
        layers = [  # for each kind of layer, how many there are, and the attention of one
            (count, partial(described.attend(layout, case.x, device), *inputs.qkv))
            for layout, count in Counter(described.layouts).items()
        ]
        pairs = self.batch * sum(layout.score_count(case.x, case.x) for layout in described.layouts)

        @torch.no_grad()
        def take_turn() -> dict[str, float]:
            return {
                "milliseconds": 1e3 * wall_seconds(run, device),
                "attention_milliseconds": 1e3
                * sum(count * wall_seconds(one, device) for count, one in layers),
                "visible_pairs": pairs,
                "parameters": model.num_parameters(),
            }

        return take_turn

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        total, pairs = rounds["milliseconds"], rounds["visible_pairs"]
        rounds["attention_share"] = rounds["attention_milliseconds"] / total
        rounds["tokens_per_second"] = 1e3 * self.batch * case.x / total
        is_ours = rounds.index.get_level_values("provider").isin(OURS)
        for reference in BASELINES:
            their_total, their_attention, their_pairs = (
                in_same_round(rounds, metric, reference)
                for metric in ("milliseconds", "attention_milliseconds", "visible_pairs")
            )
            bound = amdahl_bound(their_total, their_attention, pairs, their_pairs)
            is_bounded = is_ours & np.less(pairs, their_pairs)
            rounds[f"speedup_over_{reference}"] = their_total / total
            rounds[f"bound_{reference}"] = bound.where(is_bounded)
            rounds[f"saving_allowed_{reference}"] = (1 - bound / their_total).where(is_bounded)
            rounds[f"saving_{reference}"] = (1 - total / their_total).where(is_bounded)
        return rounds

    def sentences(self, medians: pd.DataFrame) -> list[str]:
        lines = []
        for reference in BASELINES:
            for provider, row in medians.dropna(subset=f"bound_{reference}").iterrows():
                bound, allowed, saved = (
                    row[f"{name}_{reference}"] for name in ("bound", "saving_allowed", "saving")
                )
                lines.append(
                    f"  {provider} against {reference}: Amdahl's bound, at {reference}'s own rate "
                    f"({_KERNELS[reference]}), is {bound:,.1f} ms, a saving of {allowed:.0%}; saved "
                    f"{saved:.0%}, which is {saved / allowed:.0%} of what the law allows"
                )
        return lines


class PrefillTimes(NamedTuple):
    """The times of one provider at one length.

    Attributes:
        seconds: wall time of the whole model, by round.
        attention_seconds: wall time of all layers' attention alone, by round.
        pairs: visible (query, key) pairs of all layers, heads and sequences.
    """

    seconds: list[float]
    attention_seconds: list[float]
    pairs: int


def time_prefill(
    preset: str,
    lengths: Sequence[int],
    providers: Sequence[str],
    rounds: int,
    device: str = "cpu",
    report_progress: Callable[[float], None] = lambda _share: None,
) -> dict[int, dict[str, PrefillTimes]]:
    """Time a prompt of each length in float32 by models that take turns, as `PrefillBenchmark` does.

    Args:
        preset: shape of `ls`, to which the other models are fitted.
        lengths: tokens of a prompt.
        providers: keys of `longshort.bench.model_providers.PROVIDERS`.
        rounds: rounds that are measured, after one for warm-up.
        device: "cpu" or "cuda".
        report_progress: takes the share of the work that is done, after each round.

    Returns:
        The times of the rounds, by length and provider.

    Raises:
        RuntimeError: a provider was left out, for example for lack of memory; the message names it and the
            reason.
        ValueError: an argument is wrong.
    """
    benchmark = PrefillBenchmark(
        preset=preset,
        lengths=tuple(lengths),
        providers=tuple(providers),
        rounds=rounds,
        device=device,
        max_memory_gib=_ANY_MEMORY,
    )
    results = measure(benchmark, report_progress=report_progress)
    if results.left_out:
        reasons = "; ".join(f"{remark.provider}, {remark.case}: {remark.text}" for remark in results.left_out)
        raise RuntimeError(f"not all was measured: {reasons}")

    def times(length: int, provider: str) -> PrefillTimes:
        part = results.rounds.xs((length, provider), level=("x", "provider"))
        total, attention = (part[name] / 1e3 for name in ("milliseconds", "attention_milliseconds"))
        return PrefillTimes(total.tolist(), attention.tolist(), int(part["visible_pairs"].iloc[0]))

    return {
        length: {name: times(length, name) for name in benchmark.providers} for length in benchmark.sweep()
    }

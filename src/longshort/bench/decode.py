"""Speed of decoding by whole language models after a long context: provider × length.

The caches are filled with random keys and values, since a real prompt of this length takes minutes and the
time of a step does not depend on the values. In a turn a provider decodes some tokens one by one, and the
context grows by them. Percentiles are over the steps; comparisons are between sums over rounds.

On a GPU the step of our models is captured in a CUDA graph, so that the host's launches do not count; then
memory for the context's growth is allocated before.

Models of transformers use the cache of transformers: `DynamicCache` copies itself for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Ge

from longshort.bench.benchmark import Case, Note, Turn
from longshort.bench.machine import wall_seconds
from longshort.bench.model_benchmark import ModelBenchmark
from longshort.bench.model_providers import BASELINES, Provider, bytes_of_weights_read
from longshort.bench.record import Column, in_same_round
from longshort.evaluation.generation import cache_bytes
from longshort.huggingface import SplitCache
from longshort.huggingface.cache_name import CACHE_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd


@dataclass(frozen=True)
class DecodeBenchmark(ModelBenchmark):
    """Time the tokens after a long context, in turns, by whole language models of equal size with random
    weights.

    The context is random keys and values in the caches, which no model computed. Times are wall times. The
    floor is the speedup over mhsa if a step did nothing but read the weights and the cache.
    """

    name = "decode"
    title = "Time of a token after a context"
    table = (
        Column("ms", "milliseconds", ".2f"),
        Column("90 %", "milliseconds", ".2f", at="p90"),
        Column("tokens/s", "tokens_per_second", ",.1f"),
        Column("× mhsa", "speedup_over_mhsa", ".2f"),
        Column("× gpt2", "speedup_over_gpt2", ".2f"),
        Column("floor", "floor_ratio", ".2f"),
        Column("cache MiB", "cache_bytes", ",.1f", 2.0**-20),
        Column("GB/s", "gigabytes_per_second", ".1f"),
        Column("attn µs", "attention_microseconds", ",.0f"),
        Column("attn × mhsa", "attention_speedup_over_mhsa", ".2f"),
    )

    tokens: Annotated[int, Ge(1)] = 8
    """Tokens that a provider decodes in its turn."""

    rounds: Annotated[int, Ge(1)] = 5
    """Rounds that are measured, after one for warm-up."""

    def cases(self) -> list[Case]:
        return [replace(case, columns={**case.columns, "tokens": self.tokens}) for case in super().cases()]

    @property
    def growth(self) -> int:
        """The tokens by which the context grows: those of each round, and one for attention alone; and before
        a GPU's graphs are captured one for each of these."""
        return (self.rounds + 1) * (self.tokens + 1) + 2 * (self.device == "cuda")

    def new_tokens(self, length: int) -> int:
        return 1

    def memory_of(self, provider: Provider, length: int) -> tuple[int, int]:
        dtype = self.torch_dtype
        return provider.weight_bytes(dtype) + provider.kv_bytes(length, self.batch, dtype), 0

    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        described, device = self.provider(provider), self.torch_device
        model = self.models.of(described)
        cache = described.filled_cache(model, self.batch, case.x, self.growth, inputs.generator)
        size = cache_bytes(cache)
        sizes = {
            "cache_bytes": size,
            "bytes_read": bytes_of_weights_read(model) + size,
            "parameters": model.num_parameters(),
        }
        step = partial(model, inputs.tokens, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})

        def attend() -> None:  # the layers take turns, so that none is in the processor's cache
            for layer in cache.layers:
                layer.cache.attend(*inputs.qkv)  # pyright: ignore[reportAttributeAccessIssue]

        if device.type == "cuda" and described.is_ours:
            step, attend = _captured(step), _captured(attend)

        @torch.no_grad()
        def take_turn() -> dict[str, float | list[float]]:
            steps = [1e3 * wall_seconds(step, device) for _ in range(self.tokens)]
            attention = float("nan")
            if isinstance(cache, SplitCache):
                attention = 1e6 * wall_seconds(attend, device) / len(cache.layers)
            return {"milliseconds": steps, "attention_microseconds": attention, **sizes}

        return take_turn

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        steps, read = rounds["milliseconds"].map(np.array), rounds["bytes_read"]
        rounds["round_milliseconds"] = steps.map(np.sum)
        for reference in BASELINES:
            theirs = in_same_round(rounds, "round_milliseconds", reference)
            rounds[f"speedup_over_{reference}"] = theirs / rounds["round_milliseconds"]
        attention = in_same_round(rounds, "attention_microseconds", "mhsa")
        return rounds.assign(
            tokens_per_second=1e3 * self.batch / steps,
            gigabytes_per_second=read / steps / 1e6,
            attention_speedup_over_mhsa=attention / rounds["attention_microseconds"],
            floor_ratio=read.groupby("provider").first().get("mhsa", float("nan")) / read,
        )


@torch.no_grad()
def _captured(step: Callable[[], object]) -> Callable[[], None]:
    """Run a step, which compiles its kernels, and return one that replays it as a CUDA graph."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay

"""A probe of attention logits: statistics of each head on a fixed set of sequences, seen in a fixed set of
rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longshort.checks import require_integer
from longshort.layers import LongShortAttention, Observation
from longshort.stability.visibility import are_visible, sink_keys_of

QUANTILE = 0.999

STRIDE = 16
"""The default distance between the queries that are measured."""

Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ProbeReading:
    """Statistics of the logits, |scale·q·k| before softcap and ALiBi, by layer and head.

    The range of a row is its largest minus its smallest scale·q·k, with ALiBi's bias. Softmax ignores what
    all logits of a row have in common, so only the range can sharpen it. (Readings of `AttentionMonitor`
    leave the bias out, in which growing logits would be hard to see.)

    Attributes:
        max_logit: the largest logit.
        quantile: the 99.9th percentile of the logits.
        row_range: the largest range of a row.
        max_logit_in_band, quantile_in_band, row_range_in_band: the same over the pairs inside the band, which
            are as many for every head; None if no band was given.
    """

    max_logit: list[list[float]]
    quantile: list[list[float]]
    row_range: list[list[float]]
    max_logit_in_band: list[list[float]] | None
    quantile_in_band: list[list[float]] | None
    row_range_in_band: list[list[float]] | None

    def as_metrics(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


class AttentionProbe:
    """Measures the attention layers of a model in passes over sequences that stay the same.

    All logits of every `stride`-th query are computed, head by head: n²/stride numbers for a global head.

        with probe.observing():
            model(sequences)
        reading = probe.reading()

    Args:
        model: holds `LongShortAttention` layers; layers are counted in the order of `model.modules()`.
        band: number of keys, the query's own included, over which heads are measured a second time; None:
            they are not.
        stride: distance between the queries that are measured; the last one of a sequence is among them.

    Raises:
        ValueError: the model has no such layer, or band or stride is not an integer >= 1.
    """

    def __init__(self, model: nn.Module, band: int | None, stride: int = STRIDE) -> None:
        if band is not None:
            require_integer("band", band, minimum=1)
        require_integer("stride", stride, minimum=1)
        self._layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
        if not self._layers:
            raise ValueError(f"model must have LongShortAttention layers, got {type(model).__name__} without")
        self._band, self._stride = band, stride
        observe: Any = torch.compiler.disable(self._observe)
        self._observers = [partial(observe, index) for index in range(len(self._layers))]
        self._clear()

    def _clear(self) -> None:
        # by layer and pass: for each set of pairs the sizes of each head's logits, and its largest row range
        self._passes: list[list[list[tuple[list[Tensor], Tensor]]]] = [[] for _ in self._layers]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Measure the passes inside for the next reading; other observers of the layers see them too."""
        for layer, observer in zip(self._layers, self._observers, strict=True):
            layer.add_observer(observer)
        try:
            yield
        finally:
            for layer, observer in zip(self._layers, self._observers, strict=True):
                layer.remove_observer(observer)

    @torch.no_grad()
    def _observe(self, index: int, observation: Observation) -> None:
        if observation.extend is not None:
            raise ValueError("a probe does not go with a sequence that is cut across ranks")
        layout = self._layers[index].layout
        q, k = observation.q, observation.k
        q_len, kv_len, dtype = q.shape[2], k.shape[2], torch.promote_types(q.dtype, torch.float32)
        rows = torch.arange((q_len - 1) % self._stride, q_len, self._stride, device=q.device)
        keys = torch.arange(kv_len, device=q.device)
        queries = keys[kv_len - q_len + rows]
        is_sink = sink_keys_of(observation, layout.sink_tokens)
        slopes = observation.options.get("alibi_slopes")
        bands = [None] if self._band is None else [None, self._band]
        found: list[tuple[list[Tensor], Tensor]] = [([], q.new_zeros(0, dtype=dtype)) for _ in bands]
        with torch.autocast(q.device.type, enabled=False):  # q and k have the attention's precision already
            for head, window in enumerate(layout.windows):
                key_head = k[:, head // layout.group_size].to(dtype)
                scores = (q[:, head, rows].to(dtype) @ key_head.mT) * q.shape[3] ** -0.5
                seen = are_visible(observation, queries, keys, window, is_sink)[:, 0].expand_as(scores)
                biased = (
                    scores if slopes is None else scores - slopes[head].to(dtype) * (queries[:, None] - keys)
                )
                for place, band in enumerate(bands):
                    inside = seen if band is None else seen & (queries[:, None] - keys < band)
                    sizes, ranges = found[place]
                    sizes.append(scores[inside].abs())
                    found[place] = sizes, torch.cat([ranges, _largest_range(biased, inside)[None]])
        self._passes[index].append(found)

    def reading(
        self, reduce_max: Reduction | None = None, reduce_mean: Reduction | None = None
    ) -> ProbeReading:
        """Return the statistics of the passes since the last reading, and clear them.

        Args:
            reduce_max: combines a tensor of numbers over processes, element by element, to the largest.
            reduce_mean: the same, to the mean; the percentile is then the mean of those of the processes.

        Raises:
            RuntimeError: nothing was observed.
        """
        if not all(self._passes):
            raise RuntimeError("no pass of the model was observed since the last reading")
        found: list[list[list[float]] | None] = [None] * 6
        for place in range(1 if self._band is None else 2):
            layers = [[one[place] for one in passes] for passes in self._passes]
            sizes = [[torch.cat(parts) for parts in zip(*(s for s, _ in one), strict=True)] for one in layers]
            numbers = torch.stack([
                torch.stack([x.amax() if len(x) else x.new_zeros(()) for layer in sizes for x in layer]),
                torch.cat([torch.stack([ranges for _, ranges in one]).amax(0) for one in layers]),
            ]).double()  # fmt: skip
            quantiles = torch.stack([_quantile(x) for layer in sizes for x in layer]).double()
            if reduce_max is not None:
                numbers = reduce_max(numbers)
            if reduce_mean is not None:
                quantiles = reduce_mean(quantiles)
            heads = [layer.layout.num_heads for layer in self._layers]
            for offset, row in enumerate((numbers[0], quantiles, numbers[1])):
                found[3 * place + offset] = [part.tolist() for part in row.cpu().split(heads)]
        self._clear()
        return ProbeReading(*found)  # pyright: ignore[reportArgumentType]


def _largest_range(scores: Tensor, seen: Tensor) -> Tensor:
    """Return the largest difference between two visible scores of a row; 0 if no row sees anything."""
    largest = scores.masked_fill(~seen, -math.inf).amax(-1)
    smallest = scores.masked_fill(~seen, math.inf).amin(-1)
    return torch.where(largest < smallest, 0.0, largest - smallest).amax()


def _quantile(sizes: Tensor) -> Tensor:
    """Return the value below which the share `QUANTILE` lies; NaN if a size is NaN, 0 if there are none."""
    if not len(sizes):
        return sizes.new_zeros(())
    if sizes.isnan().any():
        return sizes.new_full((), math.nan)
    return sizes.kthvalue(max(1, math.ceil(QUANTILE * len(sizes)))).values

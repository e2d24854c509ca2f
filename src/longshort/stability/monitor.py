"""Measurement of a model's attention logits while it trains: their size and their range in a row, by head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longshort.checks import require_integer
from longshort.layers import LongShortAttention, Observation
from longshort.layout import HeadGroup, HeadLayout
from longshort.stability.alarms import UpdateEntropy
from longshort.stability.visibility import are_visible, sink_keys_of

Reduction = Callable[[Tensor], Tensor]

MAX_LOGITS = ("max_logit", "max_logit_local", "max_logit_global", "max_logit_global_in_band")
"""The attributes of a `Reading` that are one number each and always measured."""

ROW_RANGES = ("row_range", "row_range_local", "row_range_global", "row_range_global_in_band")
"""The attributes of a `Reading` that are measured only where `AttentionMonitor` is asked to."""

_BY_HEAD = ("max_logit_by_head", "entropy_by_head", "row_range_by_head", "update_entropy_by_head")

_ROWS, _COLUMNS = 256, 1024  # at most, in a tile of scores


@dataclass(frozen=True)
class Reading:
    """The measurements of one or more observed passes of a model.

    A max logit is the largest |scale·q·k| over the visible pairs, before softcap and ALiBi; it is NaN if a
    logit was NaN. The range of a row is the largest minus the smallest scale·q·k over the keys that one query
    sees, 0 if it sees none. Softmax ignores what all logits of a row have in common, so only the range can
    sharpen it.

    Attributes:
        max_logit_by_head: for each attention layer one number per query head.
        entropy_by_head: likewise, mean entropy of the rows in nats. Of several passes, `AttentionMonitor`
            averages the means; `longshort.huggingface.LogitMonitor` takes the mean of all their rows.
        max_logit: the largest of all.
        max_logit_local: the largest of the local heads; None if there are none.
        max_logit_global: the largest of the global heads; None if there are none.
        max_logit_global_in_band: the largest of the global heads over pairs inside the band alone; None if
            there are none, or no band was given.
        row_range: the largest range of a row; None if it was not asked for. So are the following.
        row_range_local: the largest of the local heads; None if there are none.
        row_range_global: the largest of the global heads; None if there are none.
        row_range_global_in_band: the largest of the global heads over the keys inside the band alone; None if
            there are none, or no band was given.
        row_range_by_head: for each attention layer the largest range of a row by query head; None if it was
            not asked for.
        update_entropy_by_head: likewise, the spectral entropy of the update since the last reading, in nats;
            see `UpdateEntropy`; None if it was not asked for.
    """

    max_logit_by_head: list[list[float]]
    entropy_by_head: list[list[float]]
    max_logit: float
    max_logit_local: float | None
    max_logit_global: float | None
    max_logit_global_in_band: float | None
    row_range: float | None = None
    row_range_local: float | None = None
    row_range_global: float | None = None
    row_range_global_in_band: float | None = None
    row_range_by_head: list[list[float]] | None = None
    update_entropy_by_head: list[list[float]] | None = None

    def as_metrics(self) -> dict[str, Any]:
        """Return what was measured, by name: `MAX_LOGITS`, `ROW_RANGES` and the lists by head."""
        names = MAX_LOGITS if self.row_range is None else MAX_LOGITS + ROW_RANGES
        by_head = {name: getattr(self, name) for name in _BY_HEAD}
        return {
            **{name: getattr(self, name) for name in names},
            **{name: numbers for name, numbers in by_head.items() if numbers is not None},
        }


class AttentionMonitor:
    """Measures the attention layers of a model in its own passes, without extra ones.

    Outputs and gradients of the model are bit for bit what they are without it (under `torch.compile`, which
    then compiles another graph, up to rounding). Passes that are recomputed in the backward pass (gradient
    checkpointing) give the same numbers again, which changes neither the maxima nor the means.

        with monitor.observing():
            loss = model(...); loss.backward()
        reading = monitor.reading()

    Args:
        model: holds `LongShortAttention` layers; layers are counted in the order of `model.modules()`.
        band: number of keys, the query's own included; the logits of global heads are also measured over
            this band, so that they can be compared with local heads of that window; None: they are not.
        row_range: also measure `ROW_RANGES`, and by head. This computes all logits of a global head a second
            time, in tiles, so in linear memory.
        update_entropy: measures the weights of the same model with each reading; None: they are not.

    Raises:
        ValueError: the model has no such layer, band is not an integer >= 1, or row_range is not a bool.
    """

    def __init__(
        self,
        model: nn.Module,
        band: int | None,
        *,
        row_range: bool = False,
        update_entropy: UpdateEntropy | None = None,
    ):
        if band is not None:
            require_integer("band", band, minimum=1)
        if not isinstance(row_range, bool):
            raise ValueError(f"row_range must be True or False, got {row_range!r}")
        self._layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
        if not self._layers:
            raise ValueError(f"model must have LongShortAttention layers, got {type(model).__name__} without")
        self._band = band
        self._measures_ranges = row_range
        self._update_entropy = update_entropy
        observe: Any = torch.compiler.disable(self._observe)
        self._observers = [partial(observe, index) for index in range(len(self._layers))]
        self._clear()

    def _clear(self) -> None:
        self._max_logits: list[list[Tensor]] = [[] for _ in self._layers]
        self._entropies: list[list[Tensor]] = [[] for _ in self._layers]
        self._row_ranges: list[list[Tensor]] = [[] for _ in self._layers]
        # The largest logit and the largest range of a row in the band, for the global heads.
        self._in_band: list[list[Tensor]] = [[] for _ in self._layers]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Measure the passes inside, forward and backward, for the next reading.

        Other observers of the same layers see them too.
        """
        for layer, observer in zip(self._layers, self._observers, strict=True):
            layer.add_observer(observer)
        try:
            yield
        finally:
            for layer, observer in zip(self._layers, self._observers, strict=True):
                layer.remove_observer(observer)

    @torch.no_grad()
    def _observe(self, index: int, observation: Observation) -> None:
        self._max_logits[index].append(observation.stats.max_logit.detach())
        self._entropies[index].append(observation.stats.entropy.detach())
        layout = self._layers[index].layout
        if self._measures_ranges:
            if observation.extend is not None:
                raise ValueError("row_range does not go with a sequence that is cut across ranks")
            ranges = torch.empty_like(observation.stats.max_logit)
            is_sink = sink_keys_of(observation, layout.sink_tokens)
            for group in layout.groups:
                largest, smallest = _row_extremes(observation, group, group.window, is_sink)
                ranges[list(group.heads)] = (largest - smallest).amax((0, 2)).to(ranges.dtype)
            self._row_ranges[index].append(ranges)
        if self._band is not None and layout.global_heads:
            group = next(group for group in layout.groups if group.window is None)
            observation = observation.with_earlier_keys(self._band - 1)
            largest, smallest = _row_extremes(observation, group, self._band)
            max_logit = torch.maximum(largest.abs(), smallest.abs()).amax()
            self._in_band[index].append(torch.stack([max_logit, (largest - smallest).amax()]))

    def reading(self, reduce_max: Reduction | None = None, reduce_mean: Reduction | None = None) -> Reading:
        """Return the measurements since the last reading, and clear them.

        Args:
            reduce_max: combines a tensor of numbers over processes, element by element, to the largest.
            reduce_mean: the same, to the mean.

        Raises:
            RuntimeError: nothing was observed.
        """
        return self.measurements(reduce_max, reduce_mean).read()

    def measurements(
        self, reduce_max: Reduction | None = None, reduce_mean: Reduction | None = None
    ) -> Measurements:
        """Return what `reading` does, but left on the device: a GPU is not waited for, unless the updates are
        measured too."""
        if not all(self._max_logits):
            raise RuntimeError("no pass of the model was observed since the last reading")
        entropies = torch.cat([torch.stack(passes).double().mean(0) for passes in self._entropies])
        parts = [
            [torch.stack(passes).amax(0).double() for passes in by_layer if passes]
            for by_layer in (self._max_logits, self._row_ranges, self._in_band)
        ]
        numbers = torch.cat([layer for part in parts for layer in part])
        if reduce_max is not None:
            numbers = reduce_max(numbers)
        if reduce_mean is not None:
            entropies = reduce_mean(entropies)
        self._clear()
        sizes = [sum(len(layer) for layer in part) for part in parts]
        max_logits, row_ranges, in_band = numbers.split(sizes)
        return Measurements(
            [layer.layout for layer in self._layers],
            max_logits,
            row_ranges,
            in_band,
            entropies,
            None if self._update_entropy is None else self._update_entropy.measure(),
        )


@dataclass(frozen=True)
class Measurements:
    """The measurements of a `Reading`, on the device that made them.

    Attributes:
        layouts: the layouts of the layers.
        max_logits: the largest logit of each head, layer by layer.
        row_ranges: likewise; empty if they were not asked for.
        in_band: the largest logit and the largest row range inside the band, for each layer with global
            heads; empty without a band.
        entropies: the entropy of each head, layer by layer.
        update_entropy_by_head: as in `Reading`.
    """

    layouts: list[HeadLayout]
    max_logits: Tensor
    row_ranges: Tensor
    in_band: Tensor
    entropies: Tensor
    update_entropy_by_head: list[list[float]] | None

    @property
    def max_logit_by_head(self) -> tuple[Tensor, ...]:
        """The largest logit of each head: for each layer a tensor."""
        return self.max_logits.split([layout.num_heads for layout in self.layouts])

    def read(self) -> Reading:
        """Read the numbers; this waits for a GPU."""
        sizes = [len(part) for part in (self.max_logits, self.row_ranges, self.in_band)]
        numbers = torch.cat([self.max_logits, self.row_ranges, self.in_band]).cpu()  # one transfer
        max_logits, row_ranges, in_band = numbers.split(sizes)
        logits_in_band, ranges_in_band = in_band.view(-1, 2).T
        is_global = torch.tensor([window is None for layout in self.layouts for window in layout.windows])
        heads = [layout.num_heads for layout in self.layouts]
        reading = Reading(
            max_logit_by_head=[layer.tolist() for layer in max_logits.split(heads)],
            entropy_by_head=[layer.tolist() for layer in self.entropies.cpu().split(heads)],
            max_logit=max_logits.amax().item(),
            max_logit_local=_largest(max_logits[~is_global]),
            max_logit_global=_largest(max_logits[is_global]),
            max_logit_global_in_band=_largest(logits_in_band),
            update_entropy_by_head=self.update_entropy_by_head,
        )
        if not len(row_ranges):
            return reading
        return replace(
            reading,
            row_range=_largest(row_ranges),
            row_range_local=_largest(row_ranges[~is_global]),
            row_range_global=_largest(row_ranges[is_global]),
            row_range_global_in_band=_largest(ranges_in_band),
            row_range_by_head=[layer.tolist() for layer in row_ranges.split(heads)],
        )


def _largest(values: Tensor) -> float | None:
    return values.amax().item() if values.numel() else None


def _row_extremes(
    observation: Observation, group: HeadGroup, window: int | None, is_sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the largest and the smallest scale·q·k that each query of a group's heads sees:
    (batch, heads, q_len), 0 for a query that sees nothing.

    It takes tiles of queries and keys: no n×n matrix and, unlike the statistics of attention, no exponential.

    Args:
        window: number of last keys that are seen, the query's own included; None: all.
        is_sink: (batch or 1, kv_len), keys that are visible beyond the window; None: there are none.
    """
    q, k = observation.q[:, group.heads], observation.k[:, group.kv_heads]
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    past = kv_len - q_len
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0:
        nothing = torch.zeros(1, heads, 1, dtype=score_dtype, device=q.device)
        return nothing, nothing
    rows = _ROWS if window is None else min(max(window, 64), _ROWS)
    positions = torch.arange(kv_len, device=q.device)
    sinks = () if window is None or is_sink is None else positions[is_sink.any(0)].split(_COLUMNS)
    largest = torch.full((batch, heads, q_len), -math.inf, dtype=score_dtype, device=q.device)
    smallest = torch.full_like(largest, math.inf)
    with torch.autocast(q.device.type, enabled=False):  # q and k have the attention's precision already
        for start in range(0, q_len, rows):
            stop = min(start + rows, q_len)
            first = 0 if window is None else max(0, past + start - window + 1)
            q_tile = q[:, :, start:stop].to(score_dtype).reshape(batch, kv_heads, -1, head_dim)
            row_largest, row_smallest = largest[:, :, start:stop], smallest[:, :, start:stop]
            for keys in (*sinks, *positions[first : past + stop].split(_COLUMNS)):
                scores = (q_tile @ k[:, :, keys].to(score_dtype).mT).view(batch, heads, stop - start, -1)
                queries = positions[past + start : past + stop]
                hidden = ~are_visible(observation, queries, keys, window, is_sink)
                tile_largest = scores.masked_fill_(hidden, -math.inf).amax(-1)
                tile_smallest = scores.masked_fill_(hidden, math.inf).amin(-1)
                torch.maximum(row_largest, tile_largest, out=row_largest)
                torch.minimum(row_smallest, tile_smallest, out=row_smallest)
    sees_nothing = largest < smallest
    scale = head_dim**-0.5
    return largest.masked_fill_(sees_nothing, 0.0) * scale, smallest.masked_fill_(sees_nothing, 0.0) * scale

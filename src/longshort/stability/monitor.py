"""How large the attention logits of a model are, head by head, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longshort.layers import LongShortAttention, Observation
from longshort.layout import HeadLayout, require_integer

Reduction = Callable[[Tensor], Tensor]

MAX_LOGITS = ("max_logit", "max_logit_local", "max_logit_global", "max_logit_global_in_band")
"""The attributes of a `Reading` that are one number each."""


@dataclass(frozen=True)
class Reading:
    """What one or more observed passes of a model showed.

    A max logit is the largest |scale·q·k| over the visible pairs, before softcap and ALiBi; it is NaN where a
    logit was NaN.

    Attributes:
        max_logit_by_head: for each attention layer one number per query head.
        entropy_by_head: likewise, mean entropy of the rows in nats, averaged over the passes.
        max_logit: the largest of all.
        max_logit_local: the largest of the local heads; None if there are none.
        max_logit_global: the largest of the global heads; None if there are none.
        max_logit_global_in_band: the largest of the global heads over pairs inside the band alone; None if
            there are none, or no band was given.
    """

    max_logit_by_head: list[list[float]]
    entropy_by_head: list[list[float]]
    max_logit: float
    max_logit_local: float | None
    max_logit_global: float | None
    max_logit_global_in_band: float | None

    def as_metrics(self) -> dict[str, Any]:
        """The attributes by name: `MAX_LOGITS` first, then the lists by head."""
        return {
            **{name: getattr(self, name) for name in MAX_LOGITS},
            "max_logit_by_head": self.max_logit_by_head,
            "entropy_by_head": self.entropy_by_head,
        }


class AttentionMonitor:
    """Measures the attention layers of a model in passes that run anyway.

    Outputs and gradients of the model are bit for bit what they are without it (under `torch.compile`, which
    then compiles another graph, up to rounding). Passes that are recomputed in
    the backward pass (gradient checkpointing) show the same numbers again, which moves neither the maxima nor
    the means.

        with monitor.observing():
            loss = model(...); loss.backward()
        reading = monitor.reading()

    Args:
        model: holds `LongShortAttention` layers; layers are counted in the order of `model.modules()`.
        band: the global heads' logits are also measured over the band of so many keys, the query's own
            included, so that they can be compared with local heads of that window; None: not.

    Raises:
        ValueError: the model has no such layer, or band is no integer >= 1.
    """

    def __init__(self, model: nn.Module, band: int | None):
        if band is not None:
            require_integer("band", band, minimum=1)
        self._layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
        if not self._layers:
            raise ValueError(f"model must have LongShortAttention layers, got {type(model).__name__} without")
        self._band = band
        observe: Any = torch.compiler.disable(self._observe)
        self._observers = [partial(observe, index) for index in range(len(self._layers))]
        self._clear()

    def _clear(self) -> None:
        self._max_logits: list[list[Tensor]] = [[] for _ in self._layers]
        self._in_band: list[list[Tensor]] = [[] for _ in self._layers]
        self._entropies: list[list[Tensor]] = [[] for _ in self._layers]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Measure the passes inside, forward and backward; they add to what the next reading shows."""
        for layer, observer in zip(self._layers, self._observers, strict=True):
            layer.observer = observer
        try:
            yield
        finally:
            for layer in self._layers:
                layer.observer = None

    @torch.no_grad()
    def _observe(self, index: int, observation: Observation) -> None:
        self._max_logits[index].append(observation.stats.max_logit.detach())
        self._entropies[index].append(observation.stats.entropy.detach())
        layout = self._layers[index].layout
        if self._band is not None and layout.global_heads:
            self._in_band[index].append(_max_logit_in_band(observation, layout, self._band))

    def reading(self, reduce_max: Reduction | None = None, reduce_mean: Reduction | None = None) -> Reading:
        """What was observed since the last reading; clears it.

        Args:
            reduce_max, reduce_mean: combine a tensor of numbers over processes, element by element.

        Raises:
            RuntimeError: nothing was observed.
        """
        if not all(self._max_logits):
            raise RuntimeError("no pass of the model was observed since the last reading")
        max_logits = torch.cat([torch.stack(passes).amax(0) for passes in self._max_logits]).double()
        entropies = torch.cat([torch.stack(passes).double().mean(0) for passes in self._entropies])
        in_band = [torch.stack(passes).amax() for passes in self._in_band if passes]
        numbers = torch.cat([max_logits, torch.stack(in_band).double()]) if in_band else max_logits
        if reduce_max is not None:
            numbers = reduce_max(numbers)
        if reduce_mean is not None:
            entropies = reduce_mean(entropies)
        self._clear()
        numbers = numbers.cpu()
        max_logits, in_band_by_layer = numbers[: len(entropies)], numbers[len(entropies) :]
        layouts = [layer.layout for layer in self._layers]
        is_global = torch.tensor([window is None for layout in layouts for window in layout.windows])
        sizes = [layout.num_heads for layout in layouts]
        return Reading(
            max_logit_by_head=[heads.tolist() for heads in max_logits.split(sizes)],
            entropy_by_head=[heads.tolist() for heads in entropies.cpu().split(sizes)],
            max_logit=max_logits.amax().item(),
            max_logit_local=_largest(max_logits[~is_global]),
            max_logit_global=_largest(max_logits[is_global]),
            max_logit_global_in_band=_largest(in_band_by_layer),
        )


def _largest(values: Tensor) -> float | None:
    return values.amax().item() if values.numel() else None


def _max_logit_in_band(observation: Observation, layout: HeadLayout, band: int) -> Tensor:
    """The largest |scale·q·k| of the global heads over visible pairs less than `band` apart, as a scalar.

    In tiles of queries and their keys: neither n×n nor, unlike attention's own statistics, an exponential.
    """
    group = next(group for group in layout.groups if group.window is None)
    q, k = observation.q[:, group.heads], observation.k[:, group.kv_heads]
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    past = kv_len - q_len
    segment_ids = observation.options.get("segment_ids")
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    largest = torch.zeros((), dtype=score_dtype, device=q.device)
    if q.numel() == 0:
        return largest
    rows = min(max(band, 64), 256)
    with torch.autocast(q.device.type, enabled=False):  # q and k have the attention's precision already
        for start in range(0, q_len, rows):
            stop = min(start + rows, q_len)
            first, last = max(0, past + start - band + 1), past + stop
            q_tile = q[:, :, start:stop].to(score_dtype).reshape(batch, kv_heads, -1, head_dim)
            scores = q_tile @ k[:, :, first:last].to(score_dtype).mT
            scores = scores.view(batch, heads, stop - start, last - first)
            q_positions = torch.arange(past + start, last, device=q.device)[:, None]
            distances = q_positions - torch.arange(first, last, device=q.device)
            visible = (distances >= 0) & (distances < band)
            if segment_ids is not None:
                q_ids = segment_ids[:, None, past + start : last, None]
                visible = visible & (q_ids == segment_ids[:, None, None, first:last]) & (q_ids >= 0)
            largest = torch.maximum(largest, scores.masked_fill_(~visible, 0.0).abs_().amax())
    return largest * head_dim**-0.5

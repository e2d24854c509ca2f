"""Losses of a decoder under different layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from longshort.conversion.replay import LayerOutputs, find_layer_list
from longshort.huggingface.interface import recording, within_sliding_window

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor
    from transformers import PreTrainedModel

    from longshort.conversion.heads import DecoderHeads, Kept
    from longshort.layout import HeadLayout

_ROWS = 256
_LARGEST_STORE = 2 * 2**30


@contextmanager
def attending(layouts: Sequence[HeadLayout | None]) -> Iterator[None]:
    """Replace the layouts of a model that attends by layouts, inside the context."""

    def layout_of(call: Any) -> HeadLayout:
        layout = layouts[call.module.layer_idx]
        assert layout is not None
        return within_sliding_window(layout, call.sliding_window)

    with recording(layout_of):
        yield


def token_losses(model: Any, window: Int64[Tensor, " length"]) -> Float[Tensor, " predictions"]:
    """Compute the cross-entropy of each token of a window but the first, nats, in fp32.

    The window is the whole input: its first token sees nothing before it.
    """
    ids = window.to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    parts = zip(logits.split(_ROWS), ids[1:].split(_ROWS), strict=True)
    return torch.cat([F.cross_entropy(part.float(), labels, reduction="none") for part, labels in parts])


@torch.no_grad()
def mean_loss(model: Any, windows: Int64[Tensor, "count length"]) -> float:
    """Measure the mean loss of windows, nats per token, with a model in the mode that it is in."""
    losses = [token_losses(model, window).mean().item() for window in windows]
    return sum(losses) / len(losses)


class LossMeter:
    """Measures mean losses of layouts on fixed windows.

    A layout that differs from the one before in late layers only is measured from the first of these on: what
    earlier layers give is kept, as far as 2 GiB go.

    Args:
        model: attends by layouts; in eval mode.
        heads: its heads.
        windows: token ids, (count, length).
        window, sink_tokens: of local heads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: DecoderHeads,
        windows: Int64[Tensor, "count length"],
        window: int,
        sink_tokens: int,
    ) -> None:
        self._model, self._heads, self._windows = model, heads, windows
        self._window, self._sink_tokens = window, sink_tokens
        self._layers = find_layer_list(model, [layer.name for layer in heads.layers], heads.num_layers)
        self._base: Kept | None = None
        self._stores: list[LayerOutputs] = []
        self._is_verified = False

    @torch.no_grad()
    def measure(self, kept: Kept) -> list[float]:
        """Measure the mean loss of each window, nats per token, if the heads of `kept` are global."""
        skipped = self._shared_layers(kept)
        if skipped and not self._is_verified:
            self._verify(kept, skipped)
            skipped = self._shared_layers(kept)
        return [self._loss(kept, index, skipped) for index in range(len(self._windows))]

    @torch.no_grad()
    def measure_base(self, kept: Kept) -> list[float]:
        """Measure as `measure` does, and keep the layers' outputs for the measurements that follow."""
        self._base, self._stores = None, []
        if self._layers is None:
            return self.measure(kept)
        losses, stores = [], []
        for index in range(len(self._windows)):
            store = LayerOutputs(self._layers)
            with store.recording():
                losses.append(self._loss(kept, index, 0))
            stores.append(store)
            if stores[0].nbytes * len(self._windows) > _LARGEST_STORE:
                self._layers = None
                return losses + [self._loss(kept, rest, 0) for rest in range(index + 1, len(self._windows))]
        self._base, self._stores = kept, stores
        return losses

    def _shared_layers(self, kept: Kept) -> int:
        """Return the number of layers before the first in which `kept` differs from the base."""
        if self._base is None:
            return 0
        differing = kept ^ self._base
        return min((head.layer for head in differing), default=self._heads.num_layers)

    def _loss(self, kept: Kept, index: int, skipped: int) -> float:
        with attending(self._heads.layouts(kept, self._window, self._sink_tokens)):
            if not skipped:
                return token_losses(self._model, self._windows[index]).mean().item()
            with self._stores[index].skipping(skipped):
                return token_losses(self._model, self._windows[index]).mean().item()

    def _verify(self, kept: Kept, skipped: int) -> None:
        """Compare a loss with and without skipped layers; skip none from now on if they differ."""
        self._is_verified = True
        with_skips, without = self._loss(kept, 0, skipped), self._loss(kept, 0, 0)
        if abs(with_skips - without) > 1e-5 * max(1.0, abs(without)):
            self._layers, self._base, self._stores = None, None, []

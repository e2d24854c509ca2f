"""The key/value heads of a decoder that may lose their distance, and layouts made of those that keep it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from longshort.huggingface import attention_layers
from longshort.huggingface.state import text_config
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from longshort.huggingface import AttentionLayer


class KVHead(NamedTuple):
    """A key/value head, with the query heads that it serves.

    Attributes:
        layer: index of the layer.
        head: index of the key/value head in it.
    """

    layer: int
    head: int


Kept = frozenset[KVHead]
"""The key/value heads that see every earlier token."""


@dataclass(frozen=True)
class DecoderHeads:
    """The attention layers of a decoder.

    Attributes:
        layers: the layers that attend, in order.
        num_layers: all layers of the decoder, those included that do not attend.
    """

    layers: tuple[AttentionLayer, ...]
    num_layers: int

    @property
    def candidates(self) -> tuple[KVHead, ...]:
        """The heads that may become local: those of the layers without a sliding window of their own."""
        return tuple(
            KVHead(layer.index, head)
            for layer in self.layers
            if layer.sliding_window is None
            for head in range(layer.num_kv_heads)
        )

    def layouts(self, kept: Collection[KVHead], window: int, sink_tokens: int) -> list[HeadLayout | None]:
        """Make the layout of each layer: the heads of `kept` are global, the other candidates local.

        A layer with a sliding window stays as it is: global here, cut to its own window where it attends.
        """
        layouts: list[HeadLayout | None] = [None] * self.num_layers
        for layer in self.layers:
            stays = layer.sliding_window is not None
            windows = tuple(
                None if stays or KVHead(layer.index, head) in kept else window
                for head in range(layer.num_kv_heads)
                for _ in range(layer.num_heads // layer.num_kv_heads)
            )
            layouts[layer.index] = HeadLayout(windows, layer.num_kv_heads, 0 if stays else sink_tokens)
        return layouts

    def kept_in(self, layouts: Sequence[HeadLayout | None]) -> Kept:
        """Return the candidates that layouts let see everything: the inverse of `layouts`."""
        kept = set()
        for candidate in self.candidates:
            layout = layouts[candidate.layer]
            if layout is not None and layout.windows[candidate.head * layout.group_size] is None:
                kept.add(candidate)
        return frozenset(kept)

    def cache_bytes(self, layouts: Sequence[HeadLayout | None], length: int, itemsize: int) -> int:
        """Count the bytes of keys and values that a `SplitCache` keeps after `length` tokens of one sequence.

        It may reserve up to a quarter more for global heads, so that it grows less often.

        Args:
            layouts: the layouts of all layers, None where one does not attend.
            length: tokens.
            itemsize: bytes of one number.
        """
        total = 0
        for layer in self.layers:
            layout = layouts[layer.index]
            assert layout is not None
            for head in range(layer.num_kv_heads):
                window = layout.windows[head * layout.group_size]
                reaches = [length]
                if window is not None:
                    reaches.append(window + layout.sink_tokens)
                if layer.sliding_window is not None:
                    reaches.append(layer.sliding_window)
                total += min(reaches) * (layer.head_dim + layer.value_dim) * itemsize
        return total

    def original_cache_bytes(self, length: int, itemsize: int) -> int:
        """Count the bytes of keys and values that the cache of transformers keeps, without layouts.

        A sliding window counts the query's own token, which the next query does not need: it keeps one less.

        Args:
            length: tokens of one sequence.
            itemsize: bytes of one number.
        """
        return sum(
            (length if layer.sliding_window is None else min(length, layer.sliding_window - 1))
            * layer.num_kv_heads
            * (layer.head_dim + layer.value_dim)
            * itemsize
            for layer in self.layers
        )


def find_heads(model: PreTrainedModel) -> DecoderHeads:
    """Find the heads of a decoder by a trial pass.

    Raises:
        ValueError: the model cannot attend by layouts, or none of its heads may become local.
    """
    heads = DecoderHeads(tuple(attention_layers(model)), text_config(model).num_hidden_layers)
    if not heads.candidates:
        raise ValueError(
            "model must have layers without a sliding window of their own, got "
            f"{type(model).__name__} with none"
        )
    return heads

"""Passes through a decoder that skip the layers whose outputs are known from an earlier pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


def find_layer_list(
    model: nn.Module, attention_names: Sequence[str], num_layers: int
) -> nn.ModuleList | None:
    """Find the list of a decoder's layers: the one that all attention modules are in, each in its own entry.

    Args:
        model: the decoder.
        attention_names: paths of attention modules in it.
        num_layers: entries of the list.

    Returns:
        The list, or None if there is no such list.
    """
    prefixes = {match[1] for name in attention_names if (match := re.match(r"(.*)\.\d+\.", name))}
    if len(prefixes) != 1:
        return None
    found = model.get_submodule(prefixes.pop())
    return found if isinstance(found, nn.ModuleList) and len(found) == num_layers else None


class LayerOutputs:
    """The outputs of a decoder's layers for one input.

    Args:
        layers: the decoder's layers.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._outputs: list[Any] = [None] * len(layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs that are kept."""
        flat = (x for output in self._outputs for x in (output if isinstance(output, tuple) else (output,)))
        return sum(x.nbytes for x in flat if isinstance(x, Tensor))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the outputs of the pass in this context."""
        hooks = [
            layer.register_forward_hook(
                lambda _module, _inputs, output, index=index: self._keep(index, output)
            )
            for index, layer in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def skipping(self, count: int) -> Iterator[None]:
        """Let the first `count` layers return their kept outputs, without computing them."""
        originals = list(self._layers[:count])
        try:
            for index, layer in enumerate(originals):
                self._layers[index] = _Stand(layer, self._outputs[index])
            yield
        finally:
            for index, layer in enumerate(originals):
                self._layers[index] = layer

    def _keep(self, index: int, output: Any) -> None:
        self._outputs[index] = output


class _Stand(nn.Module):
    """A stand-in for a layer, with the layer's attributes for a decoder that reads them."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: the layer has another owner
        self.__dict__["output"] = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["output"]

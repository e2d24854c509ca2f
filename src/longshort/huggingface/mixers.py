"""Comparison of the layers of a decoder that mix tokens, each on the same inputs in two passes.

Rounding in bf16 may send a token to another expert of a mixture, after which hidden states and logits of two
right passes have little in common. What a layer of attention makes of given inputs still has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


class LayerError(ValueError):
    """A layer gave something else for the same inputs."""


@dataclass
class _Pass:
    """What a layer got and gave: (1, tokens, width)."""

    inputs: Tensor | None = None
    output: Tensor | None = None
    taken: int = 0
    """Tokens that were compared."""


@dataclass
class MixerTrial:
    """The layers that mix tokens, in a pass over a sequence and in others that must do the same.

    The other passes may take the sequence in parts. They hand each layer the inputs that it had in the first
    pass, so that no difference reaches another layer.

    Args:
        names: the names of the layers' modules.
        bound: largest difference of a layer's output that passes for rounding, relative to its largest entry.
    """

    names: dict[nn.Module, str]
    bound: float
    _passes: dict[nn.Module, _Pass] = field(default_factory=dict)
    _order: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the inputs and outputs of the pass inside."""
        self._passes = {module: _Pass() for module in self.names}
        self._order = []

        def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._passes[module].inputs = _hidden_states(self.names[module], args, options).clone()
            self._order.append(module)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._passes[module].output = _output(output).clone()

        with self._hooked(before, after):
            yield

    @contextmanager
    def comparing(self, how: str) -> Iterator[None]:
        """Compare the pass inside, or several that take the sequence in parts.

        Args:
            how: words for messages on what is different.

        Raises:
            LayerError: a layer gave something else for the same inputs, or the first one got something else.
        """
        for seen in self._passes.values():
            seen.taken = 0

        def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            seen, name = self._passes[module], self.names[module]
            if seen.inputs is None or seen.output is None:
                raise LayerError(f"{name} cannot attend by a layout: {how} it runs, as it did not without")
            given = _hidden_states(name, args, options)
            wanted = seen.inputs[:, seen.taken : seen.taken + given.shape[1]]
            if module is self._order[0]:
                self._require_alike(f"{name} cannot attend by a layout: {how} its inputs", given, wanted)
            return _replaced(args, options, given, wanted)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            seen, given = self._passes[module], _output(output)
            assert seen.output is not None
            wanted = seen.output[:, seen.taken : seen.taken + given.shape[1]]
            seen.taken += given.shape[1]
            name = self.names[module]
            self._require_alike(f"{name} cannot attend by a layout: {how} its outputs", given, wanted)

        with self._hooked(before, after):
            yield

    @contextmanager
    def _hooked(self, before: Any, after: Any) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in self.names:
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
            yield

    def _require_alike(self, what: str, found: Tensor, wanted: Tensor) -> None:
        largest = self.bound * wanted.abs().max().item()
        error = (found - wanted).abs().max().item() if found.shape == wanted.shape else torch.inf
        if not error <= largest:
            raise LayerError(
                f"{what} differ by {error:.1e} from what they were for the same inputs, more than the "
                f"{largest:.1e} of rounding"
            )


@contextmanager
def noting_cache_users(model: nn.Module) -> Iterator[dict[nn.Module, str]]:
    """Yield the innermost modules that get a cache in the pass inside, with their names, once it is over."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, str] = {}

    def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if any(isinstance(x, Cache) for x in (*args, *options.values())):
            found[module] = described(names[module], module)

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        try:
            yield found
        finally:
            _keep_innermost(found)


def _keep_innermost(found: dict[nn.Module, str]) -> None:
    outer = [m for m in found if any(child is not m and child in found for child in m.modules())]
    for module in outer:
        del found[module]


def described(name: str, module: nn.Module) -> str:
    """Return a module's name and class, for messages."""
    return f"{name} ({type(module).__name__})"


def _is_hidden(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point()


def _candidates(args: tuple[Any, ...], options: dict[str, Any]) -> Iterable[Any]:
    return options.get("hidden_states"), *args, *options.values()


def _hidden_states(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    found = next((x for x in _candidates(args, options) if _is_hidden(x)), None)
    if found is None:
        raise ValueError(f"{name} cannot be tried: it takes no hidden states, (batch, tokens, width)")
    return found


def _replaced(
    args: tuple[Any, ...], options: dict[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        tuple(new if x is old else x for x in args),
        {name: new if x is old else x for name, x in options.items()},
    )


def _output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]

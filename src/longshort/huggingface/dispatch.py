"""Interception of the attention calls of Hugging Face models, whatever their attention implementation.

The attention layers of transformers look up the function that computes their attention by name, in one
registry. While somebody listens, each entry is replaced by a wrapper that reports the call and then makes it,
unchanged. `torch.compile` sees the replacement, and compiles a graph with it and one without.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from jaxtyping import Float

EAGER = "eager"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention function by a layer.

    The tensors are live: they are in the graph of the forward pass and must not be changed in place.

    Attributes:
        module: the layer.
        implementation: name of the attention implementation.
        q, k: as the attention got them, normalised and rotated.
        mask: what the implementation takes as its mask, or None.
        options: the other keyword arguments of the call.
    """

    module: nn.Module
    implementation: str
    q: Float[Tensor, "batch heads q_len head_dim"]
    k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    mask: Any
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The layer, for messages."""
        return layer_name(self.module)


class Listener(Protocol):
    """What `listen` takes."""

    def hears(self, module: nn.Module) -> bool:
        """Return whether calls of this layer are of interest."""
        ...

    def on_call(self, call: AttentionCall) -> None:
        """Take note of a call, before it is made; an error stops the forward pass."""
        ...


_listeners: list[weakref.ref[Listener]] = []
_replaced: dict[
    str, tuple[Callable[..., Any], Callable[..., Any] | None]
] = {}  # wrapper and original, by name


def listen(listener: Listener) -> None:
    """Report all attention calls to a listener, beside others, until `stop_listening`, or until it is
    gone."""
    _forget_the_dead()
    _listeners.append(weakref.ref(listener, lambda _: _forget_the_dead()))
    if not _replaced:
        _replace_functions()


def stop_listening(listener: Listener) -> None:
    """Report no more calls to a listener; the last one to leave restores the registry."""
    for reference in reversed(_listeners):
        if reference() is listener:
            _listeners.remove(reference)
            break
    _forget_the_dead()


def layer_name(module: nn.Module) -> str:
    """Return a layer's number and class, for messages."""
    return f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"


def _forget_the_dead() -> None:
    _listeners[:] = [reference for reference in _listeners if reference() is not None]
    if not _listeners:
        _restore_functions()


def _replace_functions() -> None:
    registry = AttentionInterface()
    for name in {*registry.keys(), EAGER}:
        original = registry.get(name)
        wrapper = _wrapper(name, original)
        AttentionInterface.register(name, wrapper)
        _replaced[name] = wrapper, original


def _restore_functions() -> None:
    registry = AttentionInterface()
    for name, (wrapper, original) in _replaced.items():
        if registry.get(name) is not wrapper:  # somebody has registered another function since
            continue
        if original is not None:
            AttentionInterface.register(name, original)
        else:  # transformers has no method for it
            AttentionInterface._global_mapping.pop(name)
    _replaced.clear()


@cache  # one per function, so that compilers know it again
def _wrapper(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    def reported(module: nn.Module, *args: Any, **options: Any) -> Any:
        function = own_eager_attention(type(module)) if original is None else original
        _report(name, module, args, options)
        return function(module, *args, **options)

    return reported


@cache
def own_eager_attention(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the eager attention of a class of layers, which is a function in the module that defines it.

    Raises:
        RuntimeError: its forward pass names no such function.
    """
    forward = inspect.unwrap(kind.forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    functions = [forward.__globals__[name] for name in names if name in forward.__globals__]
    if len(functions) != 1:
        raise RuntimeError(
            f"{kind.__name__}.forward must name one eager attention function to be watched with eager "
            f"attention, got {names}"
        )
    return functions[0]


@torch.compiler.disable
@torch.no_grad()
def _report(implementation: str, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    listeners = [listener for reference in _listeners if (listener := reference()) is not None]
    listeners = [listener for listener in listeners if listener.hears(module)]
    if not listeners:
        return
    named = dict(zip(("query", "key", "value", "attention_mask"), args, strict=False)) | options
    q, k, mask = (named.pop(name, None) for name in ("query", "key", "attention_mask"))
    if not isinstance(q, Tensor) or not isinstance(k, Tensor):
        raise ValueError(
            f"{layer_name(module)} must hand its queries and keys to the attention as tensors to be watched, "
            f"got {type(q).__name__} and {type(k).__name__}; a SplitCache keeps its keys to itself "
            "(use_cache=False)"
        )
    call = AttentionCall(module, implementation, q.detach(), k.detach(), mask, named)
    for listener in listeners:
        listener.on_call(call)

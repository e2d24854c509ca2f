"""Interception of the attention calls of Hugging Face models, whatever their attention implementation.

The attention layers of transformers look up the function that computes their attention by name, in one
registry. While there are listeners, each entry is overridden by a wrapper that reports the call and then
makes it, unchanged, to the function that is registered at that time. `torch.compile` sees the override, and
compiles a graph with it and one without.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

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
        findings: what listeners have computed from the call, for each other.
    """

    module: nn.Module
    implementation: str
    q: Float[Tensor, "batch heads q_len head_dim"]
    k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    mask: Any
    options: dict[str, Any]
    findings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The layer, for messages."""
        return layer_name(self.module)


class Listener(Protocol):
    """The protocol of listeners to attention calls."""

    def hears(self, module: nn.Module) -> bool:
        """Return whether calls of this layer are of interest."""
        ...

    def on_call(self, call: AttentionCall) -> None:
        """Take note of a call, before it is made; an error stops the forward pass."""
        ...


_listeners: list[weakref.ref[Listener]] = []
# what is registered for all, without the overrides of the models' instance
_registered = AttentionInterface()
# the wrapper, and the override that it stands for, by name
_replaced: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}


def listen(listener: Listener) -> None:
    """Report all attention calls to a listener, beside others, until `stop_listening`, or until it is
    deleted."""
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
    for name in {*ALL_ATTENTION_FUNCTIONS, EAGER}:
        override = _taken_override(name)
        _replaced[name] = _wrapper(name, override), override
    ALL_ATTENTION_FUNCTIONS.update({name: wrapper for name, (wrapper, _) in _replaced.items()})


def _restore_functions() -> None:
    for name, (wrapper, override) in _replaced.items():
        if ALL_ATTENTION_FUNCTIONS.get(name) is not wrapper:  # somebody has put another override there since
            continue
        del ALL_ATTENTION_FUNCTIONS[name]
        if override is not None:
            ALL_ATTENTION_FUNCTIONS[name] = override
    _replaced.clear()


def _taken_override(name: str) -> Callable[..., Any] | None:
    """Remove what overrides a registered function, and return it; None if nothing does."""
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    try:
        del ALL_ATTENTION_FUNCTIONS[name]
    except KeyError:
        return None
    return function


_eager_functions: dict[type[nn.Module], Callable[..., Any]] = {}
_wrappers: dict[tuple[str, Callable[..., Any] | None], Callable[..., Any]] = {}


def _wrapper(name: str, override: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return the wrapper of a function, always the same one, so that compilers know it again.

    Args:
        name: the name of the implementation.
        override: its function; None: what is registered when it is called, or else that of each class of
            layers.
    """

    report: Any = torch.compiler.disable(_report_call)

    def reported(module: nn.Module, *args: Any, **options: Any) -> Any:
        function = _registered.get(name) if override is None else override
        if function is None:
            if type(module) not in _eager_functions:
                _find_eager_attention(type(module))
            function = _eager_functions[type(module)]
        report(name, module, args, options)
        return function(module, *args, **options)

    return _wrappers.setdefault((name, override), reported)


@torch.compiler.disable
def _find_eager_attention(kind: type[nn.Module]) -> None:
    """Find the eager attention of a class of layers: a function of the Python module that defines it.

    Raises:
        RuntimeError: its forward pass names no such function.
    """
    forward = inspect.unwrap(kind.forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    found = [forward.__globals__[name] for name in names if name in forward.__globals__]
    if len(found) != 1:
        raise RuntimeError(
            f"{kind.__name__}.forward must name one eager attention function to be watched with eager "
            f"attention, got {names}"
        )
    _eager_functions[kind] = found[0]


def _report_call(
    implementation: str, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
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
    call = AttentionCall(module, implementation, q, k, mask, named)
    for listener in listeners:
        listener.on_call(call)

"""Registration of a backend's operators with torch.library.

It does without `torch.library.custom_op`, which imports the compiler on its first call: seconds and 80 MiB.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

if TYPE_CHECKING:
    from collections.abc import Callable

_library = torch.library.Library("longshort", "FRAGMENT")
NO_TANGENTS = "forward-mode differentiation is on, and this backend computes no tangents; 'reference' does"

_functions: dict[str, Any] = {}  # by name of the operator


def define(
    name: str,
    dispatch_key: str,
    function: Callable,
    fake: Callable,
    *,
    mutates_args: tuple[str, ...] = (),
    refuse_tangents: bool = True,
) -> None:
    """Define torch.ops.longshort.NAME, without gradients.

    Args:
        name: name of the operator.
        dispatch_key: the devices that `function` is for.
        function: annotated; its annotations are the operator's schema.
        fake: the same for tensors without data: it returns tensors of the right shapes, dtypes and strides.
        mutates_args: names of the arguments that the operator writes to.
        refuse_tangents: refuse to run under forward-mode differentiation.
    """
    _library.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
    if refuse_tangents:
        function, fake = _refusing_tangents(function), _refusing_tangents(fake)
    _library.impl(name, function, dispatch_key)
    torch.library.register_fake(f"longshort::{name}", fake, lib=_library)


def differentiate(name: str, setup_context: Callable, gradients: Callable) -> None:
    """Give torch.ops.longshort.NAME gradients, as `torch.library.register_autograd` takes them."""
    torch.library.register_autograd(
        f"longshort::{name}", gradients, setup_context=setup_context, lib=_library
    )


def vectorize(name: str, rule: Callable) -> None:
    """Set how `torch.vmap` calls torch.ops.longshort.NAME, as `torch.library.register_vmap` takes it."""
    torch.library.register_vmap(f"longshort::{name}", rule, lib=_library)


def register(
    name: str,
    dispatch_key: str,
    *,
    forward: Callable,
    fake_forward: Callable,
    save_for_backward: Callable,
    gradients: Callable,
    backward: Callable,
    fake_backward: Callable,
) -> None:
    """Define torch.ops.longshort.NAME and NAME_backward; `call` calls them, under transforms of
    `torch.func` too. Both refuse to run under forward-mode differentiation.

    Args:
        name: name of the forward operator.
        dispatch_key: the devices that the two functions are for.
        forward, backward: annotated functions; their annotations are the operators' schemas.
        fake_forward, fake_backward: the same for tensors without data: they return tensors of the right
            shapes, dtypes and strides.
        save_for_backward: `setup_context` of `torch.library.register_autograd`.
        gradients: calls NAME_backward, which has no gradients itself and raises an error if asked for them.
    """
    for operator, function, fake, setup_context, derivative in (
        (name, forward, fake_forward, save_for_backward, gradients),
        (f"{name}_backward", backward, fake_backward, _save_nothing, _refuse_second_derivatives),
    ):
        define(operator, dispatch_key, function, fake)
        differentiate(operator, setup_context, derivative)
        _functions[operator] = _function(operator, setup_context, derivative)
        vectorize(operator, _functions[operator].vmap)


def call(name: str, *args: Any) -> Any:
    """Call torch.ops.longshort.NAME, an operator made by `register`; `torch.vmap` calls it once per slice."""
    if transforms_are_active():  # register_autograd does not support them
        return _functions[name].apply(*args)
    return getattr(torch.ops.longshort, name)(*args)


def transforms_are_active() -> bool:
    """Return whether the caller is inside `torch.func.grad`, `vmap` or another transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_is_on() -> bool:
    """Return whether tensors may carry tangents: inside `torch.func.jvp`, `jacfwd`, `hessian` or
    `torch.autograd.forward_ad`."""
    return forward_ad._current_level >= 0  # compilers guard on it


def _refusing_tangents(function: Callable) -> Callable:
    """Make a function raise under forward mode: torch would silently take its results' tangents for zero."""

    @wraps(function)
    def checked(*args: Any) -> Any:
        if forward_mode_is_on():
            raise NotImplementedError(NO_TANGENTS)
        return function(*args)

    return checked


def _function(name: str, setup_context: Callable, derivative: Callable) -> Any:
    operator = getattr(torch.ops.longshort, name)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def part(x: Any, dim: Any, i: int) -> Any:
            return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x

        results = [
            call(name, *(part(x, dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(slices) for slices in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    methods = {"forward": operator, "setup_context": setup_context, "backward": derivative, "vmap": vmap}
    return type(name, (Function,), {key: staticmethod(method) for key, method in methods.items()})


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_second_derivatives(ctx: Any, *gradients: Any) -> NoReturn:
    raise NotImplementedError("this backend has no gradients of gradients; backend='reference' has")

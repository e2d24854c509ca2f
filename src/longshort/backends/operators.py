"""Registers the operators of a backend with torch.library.

By hand, since `torch.library.custom_op` imports the compiler on its first call: seconds and 80 MiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_library = torch.library.Library("longshort", "FRAGMENT")


def define(
    name: str, dispatch_key: str, function: Callable, fake: Callable, mutates_args: tuple[str, ...] = ()
) -> None:
    """Defines torch.ops.longshort.NAME, without gradients.

    Args:
        name: of the operator.
        dispatch_key: for which devices `function` is.
        function: annotated; its annotations are the operator's schema.
        fake: the same for tensors without data: it gives shapes, dtypes and strides.
        mutates_args: names of the arguments that it writes to.
    """
    _library.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
    _library.impl(name, function, dispatch_key)
    torch.library.register_fake(f"longshort::{name}", fake, lib=_library)


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
    """Defines torch.ops.longshort.NAME and NAME_backward.

    Args:
        name: of the forward operator.
        dispatch_key: for which devices the two functions are.
        forward, backward: annotated functions; their annotations are the operators' schemas.
        fake_forward, fake_backward: the same for tensors without data: they give shapes, dtypes and strides.
        save_for_backward: `setup_context` of `torch.library.register_autograd`.
        gradients: calls NAME_backward; it has no gradients itself, and says so.
    """
    for operator, function, fake in (
        (name, forward, fake_forward),
        (f"{name}_backward", backward, fake_backward),
    ):
        define(operator, dispatch_key, function, fake)
    torch.library.register_autograd(
        f"longshort::{name}", gradients, setup_context=save_for_backward, lib=_library
    )
    torch.library.register_autograd(f"longshort::{name}_backward", _refuse_second_derivatives, lib=_library)


def _refuse_second_derivatives(ctx, *gradients) -> NoReturn:
    raise NotImplementedError("this backend has no gradients of gradients; backend='reference' has")

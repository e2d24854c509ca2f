"""Products that sum over visible pairs alone.

A hidden pair has the weight 0, but 0·NaN and 0·inf are NaN: a matrix product would carry a NaN or inf of
hidden keys, values and gradients into rows that do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import Function

from longshort.backends import operators


def visible_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Compute q·k of the visible pairs, 0 on hidden ones; gradients and tangents of every order are sums over
    visible pairs too.

    Args:
        q: (…, rows, dim).
        k: (…, keys, dim), of the same leading dimensions.
        visible: broadcasts to (…, rows, keys).
    """
    function = torch.ops.longshort.visible_scores if torch.compiler.is_compiling() else _Scores.apply
    return function(q, k, visible)


def visible_product(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """Sum weights·x over the visible keys of each row; gradients and tangents of every order are sums over
    visible pairs too.

    Args:
        weights: (…, rows, keys), 0, NaN or infinite on hidden pairs.
        x: (…, keys, dim), of the same leading dimensions.
        visible: broadcasts to (…, rows, keys).
    """
    function = torch.ops.longshort.visible_product if torch.compiler.is_compiling() else _Product.apply
    return function(weights, x, visible)


def is_finite(*tensors: Tensor) -> bool:
    """Return whether no entry is NaN or infinite; waits for the device. Always True while a CUDA graph is
    captured, when nothing can be read."""
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    # a sum is the fastest check of all entries, but may overflow where no entry did
    return all(
        math.isfinite(x.sum()) or all(math.isfinite(extreme) for extreme in torch.aminmax(x)) for x in tensors
    )


def zero_nonfinite(x: Tensor) -> Tensor:
    """Replace NaN and inf by 0; keeps the memory layout, without which products would differ in some bits."""
    if x.numel() == 0:
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.as_strided((span,), (1,))
    return memory.nan_to_num(0.0, 0.0, 0.0).as_strided(x.shape, x.stride(), 0)


def nonfinite_terms(
    multiply: Callable[[Tensor, Tensor], Tensor], weights: Tensor, x: Tensor, visible: Tensor
) -> Tensor:
    """Compute what NaN and inf entries of x add to a sum over visible pairs: 0, NaN, inf or -inf.

    Args:
        multiply: returns the sums of weights·x over all pairs, for any two arguments.
        weights: 0 on hidden pairs.
        x: as `multiply` takes it.
        visible: a mask of the shape of weights.
    """

    def meet(those: Tensor, entries: Tensor) -> Tensor:
        return multiply(those.to(weights.dtype), entries.to(weights.dtype)) > 0

    undefined = meet(visible, x.isnan())
    terms = torch.zeros_like(undefined, dtype=weights.dtype)
    up, down = x == torch.inf, x == -torch.inf
    if not (up | down).any():
        return terms.masked_fill_(undefined, torch.nan)
    positive, negative = weights > 0, weights < 0
    rises = meet(positive, up) | meet(negative, down)
    falls = meet(positive, down) | meet(negative, up)
    undefined |= (rises & falls) | meet(visible & (weights == 0), up | down)
    terms.masked_fill_(rises, torch.inf).masked_fill_(falls, -torch.inf)
    return terms.masked_fill_(undefined, torch.nan)


def add_terms(out: Tensor, terms: Tensor) -> Tensor:
    """Add terms to out, which keeps every bit where the terms are 0."""
    return torch.where(terms == 0, out, out + terms)


def _sum_over_visible(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    out = weights @ x
    if is_finite(out):
        return out
    weights = weights.masked_fill(~visible, 0.0)
    terms = nonfinite_terms(torch.matmul, weights, x, visible.expand_as(weights))
    return add_terms(weights @ zero_nonfinite(x), terms)


def _product_of_all(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    return weights @ x


def _batch_first(info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims, strict=True)
    ]


def _vmap_sum(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
    return torch.ops.longshort.sum_over_visible(*_batch_first(info, in_dims, inputs)), 0


# an operator, since neither vmap nor compilers can inspect values
operators.define(
    "sum_over_visible",
    "CompositeExplicitAutograd",
    _sum_over_visible,
    _product_of_all,
    refuse_tangents=False,  # `_Product` has its tangents
)
operators.vectorize("sum_over_visible", _vmap_sum)


class _Bilinear(Function):
    """A bilinear function of its first two arguments; the third marks the visible pairs."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def jvp(cls, ctx: Any, first_tangent: Tensor | None, second_tangent: Tensor | None, _: None) -> Tensor:
        _refuse_nested_tangents()
        first, second, visible = ctx.saved_tensors
        terms = []
        if first_tangent is not None:
            terms.append(cls.apply(first_tangent, second, visible))
        if second_tangent is not None:
            terms.append(cls.apply(first, second_tangent, visible))
        return sum(terms[1:], terms[0])

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return cls.apply(*_batch_first(info, in_dims, inputs)), 0


class _Scores(_Bilinear):
    @staticmethod
    def forward(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~visible, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        q, k, visible = ctx.saved_tensors
        grad_q = visible_product(grads[0], k, visible) if ctx.needs_input_grad[0] else None
        grad_k = visible_product(grads[0].mT, q, visible.mT) if ctx.needs_input_grad[1] else None
        return grad_q, grad_k, None


class _Product(_Bilinear):
    @staticmethod
    def forward(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
        return torch.ops.longshort.sum_over_visible(weights, x, visible)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, x, visible = ctx.saved_tensors
        grad_weights = visible_scores(grads[0], x, visible) if ctx.needs_input_grad[0] else None
        grad_x = visible_product(weights.mT, grads[0], visible.mT) if ctx.needs_input_grad[1] else None
        return grad_weights, grad_x, None


def _refuse_nested_tangents() -> None:
    """Raise under nested forward mode: torch takes the tangents of a function's tangents for zero."""
    levels = [interpreter.key() for interpreter in get_interpreter_stack() or []]
    if levels.count(TransformType.Jvp) > 1:
        raise NotImplementedError(
            "attention has no forward-mode derivatives of forward-mode derivatives; forward over reverse "
            "mode works: jacfwd(jacrev(f)), which is torch.func.hessian(f)"
        )


# The same for compilers, which trace no function that has tangents.
for _name, _function, _fake in (
    ("visible_scores", _Scores, lambda q, k, visible: q @ k.mT),
    ("visible_product", _Product, _product_of_all),
):
    operators.define(_name, "CompositeExplicitAutograd", _function.forward, _fake)
    operators.differentiate(_name, _function.setup_context, _function.backward)

"""Linear layers that are as fast for few tokens as the CPU's memory can deliver their weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

_FEW = 16  # tokens; up to about here reading the weights takes longer than multiplying with them


def project(
    linear: nn.Module, x: Float[Tensor, "*tokens in_features"]
) -> Float[Tensor, "*tokens out_features"]:
    """Apply a linear layer, split over the threads where that is faster.

    torch multiplies a matrix with one vector or a few in float32 on one thread, which cannot use all of the
    memory's speed; here each thread takes a part of the rows. `longshort bench projection` measures it.

    Args:
        linear: a plain `nn.Linear` without a bias may be split. Any other is called as it is, such as one
            with hooks, or what a tool for quantization or adapters has put in its place.
        x: the input of the layer.
    """
    if torch.compiler.is_compiling():  # compilers choose their own products
        return linear(x)
    rows = math.prod(x.shape[:-1])
    if not 0 < rows <= _FEW or x.dtype != torch.float32 or x.device.type != "cpu" or not _is_plain(linear):
        return linear(x)
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    out_features, in_features = weight.shape
    parts = math.gcd(out_features, torch.get_num_threads())
    if parts == 1 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return linear(x)
    vectors = x.reshape(1, rows, in_features).expand(parts, rows, in_features)
    out = torch.bmm(vectors, weight.view(parts, -1, in_features).mT)
    return out.transpose(0, 1).reshape(*x.shape[:-1], out_features)


def _is_plain(linear: nn.Module) -> bool:
    """Return whether calling the layer does nothing but multiply with a weight that is an ordinary tensor."""
    return (
        type(linear) is nn.Linear  # parametrizations, quantization and adapters change the type
        and type(linear.weight) is nn.Parameter  # as sharded and quantized tensors are not
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
        and "forward" not in linear.__dict__  # some tools wrap the method
    )

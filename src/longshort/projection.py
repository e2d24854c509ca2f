"""A linear layer that multiplies few tokens as fast as the CPU's memory gives its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FEW = 16  # tokens; up to about here reading the weights takes longer than multiplying with them


class Projection(nn.Linear):
    """`nn.Linear` without a bias.

    torch multiplies a matrix with one vector or a few in float32 on one thread, which cannot use all of the
    memory's speed; here each thread takes a part of the rows. `python benchmarks/projection.py` measures it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # compilers choose products of their own
            return F.linear(x, self.weight)
        rows = math.prod(x.shape[:-1])
        if not 0 < rows <= _FEW or x.dtype != torch.float32 or x.device.type != "cpu":
            return F.linear(x, self.weight)
        parts = math.gcd(self.out_features, torch.get_num_threads())
        if parts == 1 or self.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight)
        vectors = x.reshape(1, rows, self.in_features).expand(parts, rows, self.in_features)
        out = torch.bmm(vectors, self.weight.view(parts, -1, self.in_features).mT)
        return out.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

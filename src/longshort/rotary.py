"""Rotary positions, for all heads of a layer or for some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshort.checks import require_integer, require_positive
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, RoFormer): entry i of a head is rotated with entry i + head_dim/2
    by the angle position · base^(-2i/head_dim), as in Hugging Face's Llama.

    Attributes:
        base: finite, > 0.
        skip_heads: query heads that stay as they are; all heads of a key/value group or none.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    base: float = 10_000.0
    skip_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_positive("base", self.base)
        if isinstance(self.skip_heads, str) or not isinstance(self.skip_heads, Iterable):
            raise ValueError(f"skip_heads must be a sequence of query heads, got {self.skip_heads!r}")
        heads = tuple(self.skip_heads)
        for head in heads:
            require_integer("every entry of skip_heads", head, minimum=0)
        object.__setattr__(self, "skip_heads", tuple(sorted(set(heads))))


def rotate(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads q_len head_dim"],
    position_ids: Int[Tensor, "batch q_len"],
    base: float,
    runs: Sequence[tuple[int, bool]],
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in the runs of heads that are to be rotated (see `rotated_runs`).

    The result is in fp32 at least, so that a bf16 head is rounded only once, when attention gets it.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (x.to(q.device, dtype) for x in _cos_sin(position_ids, base, q.shape[3]))
    return _rotate_runs(q, cos, sin, runs, 1), _rotate_runs(k, cos, sin, runs, q.shape[1] // k.shape[1])


def _cos_sin(position_ids: Tensor, base: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the angles, (batch, 1, q_len, head_dim/2), in float64.

    In fp32 an angle near 131,072 would be off by up to 0.008. There is no table: for a few tokens this takes
    as long as a look-up would, and for many tokens n·head_dim/2 numbers are little beside attention.
    """
    if position_ids.device.type == "mps":  # has no float64
        position_ids = position_ids.cpu()
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_ids.device) / -head_dim
    angles = position_ids[:, None, :, None] * base**exponents
    return angles.cos(), angles.sin()


def rotated_runs(rotary: Rotary | None, layout: HeadLayout, head_dim: int) -> list[tuple[int, bool]]:
    """Return the runs of consecutive query heads: how many, and whether they are rotated.

    Raises:
        TypeError: rotary is not a Rotary.
        ValueError: head_dim is odd, or skip_heads do not fit the layout; the message names it.
    """
    if rotary is None:
        return []
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a Rotary, such as Rotary(base=10_000.0), or None, got {rotary!r}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
    skipped = set(rotary.skip_heads)
    if not skipped <= set(range(layout.num_heads)):
        raise ValueError(
            f"rotary.skip_heads must be query heads 0 ... {layout.num_heads - 1}, got {rotary.skip_heads}"
        )
    for start in range(0, layout.num_heads, layout.group_size):
        group = set(range(start, start + layout.group_size))
        if group & skipped and not group <= skipped:
            raise ValueError(
                f"rotary.skip_heads must hold all query heads that share a key/value head or none, "
                f"got {rotary.skip_heads} where heads {sorted(group)} share one"
            )
    kinds = groupby(head not in skipped for head in range(layout.num_heads))
    return [(len(list(run)), is_rotated) for is_rotated, run in kinds]


def _rotate_runs(
    x: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[tuple[int, bool]], group_size: int
) -> Tensor:
    parts = x.split([count // group_size for count, _ in runs], dim=1)
    kinds = [is_rotated for _, is_rotated in runs]
    rotated = [
        _rotate_halves(part, cos, sin) if kind else part for part, kind in zip(parts, kinds, strict=True)
    ]
    return rotated[0] if len(rotated) == 1 else torch.cat(rotated, dim=1)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

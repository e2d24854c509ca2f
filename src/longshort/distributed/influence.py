"""A check that every key influences exactly the rows that may see it, also where ranks meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from longshort.checks import require_integer
from longshort.distributed.exchange import gather
from longshort.distributed.partition import take_part
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


def visible_pairs(
    layout: HeadLayout, length: int, segment_ids: Int[Tensor, " length"] | None = None
) -> Bool[Tensor, "heads length length"]:
    """Return which keys each query of each head sees, from the definition, as an n×n matrix: for short
    sequences."""
    ids = torch.zeros(length, dtype=torch.int64) if segment_ids is None else segment_ids
    position = torch.arange(length)
    same = (ids[:, None] == ids) & (ids >= 0)
    earlier = position <= position[:, None]
    rank_in_segment = (same & (position < position[:, None])).sum(1)
    is_sink = rank_in_segment < layout.sink_tokens
    heads = []
    for window in layout.windows:
        near = earlier if window is None else earlier & ((position[:, None] - position < window) | is_sink)
        heads.append(same & near)
    return torch.stack(heads)


def check_influence(
    attend: Callable[..., Tensor],
    layout: HeadLayout,
    length: int,
    *,
    group: dist.ProcessGroup | None = None,
    segment_ids: Int[Tensor, " length"] | None = None,
    head_dim: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Raise unless the gradient of each row of the output reaches exactly the keys and values that it sees.

    A window that is lost, a halo that is a key short, or a sink that is missing changes losses little and is
    found by nothing else. All ranks must call it; it takes a backward pass for each row, so choose a length
    of tens.

    Args:
        attend: `attend(q, k, v, layout, group=group, segment_ids=ids)`, as `context_attention`, of this
            rank's part of all.
        layout: the layout of the heads.
        length: tokens of the sequence, a multiple of the number of ranks.
        group: the ranks; None: all processes.
        segment_ids: the segment ids of the whole sequence, on the CPU.
        head_dim: width of a head.
        seed: the seed of the random q, k and v.
        device: where they are, one that the group's backend serves.

    Raises:
        AssertionError: an influence is missing, or should not be there; the message names the head, the row
            and the key. It is raised on all ranks.
        ValueError: length is no multiple of the number of ranks.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None
    rank, ranks = group.rank(), group.size()
    require_integer("length", length, minimum=1)
    if length % ranks:
        raise ValueError(f"length must be a multiple of the {ranks} ranks, got {length}")
    generator = torch.Generator().manual_seed(seed)

    def part_of(heads: int) -> Tensor:
        whole = torch.randn(1, heads, length, head_dim, generator=generator, dtype=torch.float32)
        return take_part(whole, rank, ranks, dim=2).clone().to(device)

    q = part_of(layout.num_heads)
    k, v = (part_of(layout.num_kv_heads).requires_grad_() for _ in range(2))
    ids = None if segment_ids is None else take_part(segment_ids[None], rank, ranks).to(device)
    part = length // ranks
    reached = []
    for row in range(length):
        out = attend(q, k, v, layout, group=group, segment_ids=ids)
        mine = out[:, :, row - rank * part] if row // part == rank else 0 * out[:, :, 0]
        gradients = torch.autograd.grad(mine.sum(), (k, v))
        reached.append(torch.stack([(gradient != 0).any(-1)[0] for gradient in gradients]))
    # (rows, k or v, kv_heads, part) of each rank -> (k or v, kv_heads, rows, keys)
    everywhere = gather(torch.stack(reached).to(torch.uint8), group).bool().cpu()
    found = everywhere.movedim(0, 3).flatten(3).permute(1, 2, 0, 3)
    visible = visible_pairs(layout, length, segment_ids)[:: layout.group_size]
    # the only key that a row sees has probability 1 whatever it is
    several = visible.sum(-1, keepdim=True) > 1
    for name, influence, expected in (("v", found[1], visible), ("k", found[0], visible & several)):
        wrong = (influence != expected).nonzero()
        if len(wrong):
            head, row, key = wrong[0].tolist()
            says = "does not influence" if expected[head, row, key] else "influences"
            window = layout.windows[head * layout.group_size]
            raise AssertionError(
                f"{name} of key {key} {says} row {row} of KV head {head} (window {window}, parts of {part} "
                f"tokens), and {len(wrong) - 1} more such pairs are wrong"
            )

"""The bytes that ranks send for one layer's attention: formulas, for plans and beside what is counted.

Bytes are those that one rank sends in the forward pass of one layer, the mean over the ranks; the backward
pass sends as many. n tokens on R ranks, D = head_dim, e = bytes of a number, B = sequences:

- halo: min(w - 1, tokens before the part) keys and values of each local KV head, 2·B·D·e a token.
- sinks: sink tokens that lie before the halo, likewise.
- gather: 2·B·D·e·(n/R)·(R - 1) for each global KV head.
- lent: B·D·e for each query head and each query that is lent, and as much for its output, which returns.
- all-gather of all heads: as gather, for all KV heads. A ring of them sends as many bytes, in R - 1 steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from longshort.checks import require_integer

if TYPE_CHECKING:
    from longshort.layout import HeadLayout


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one layer's forward pass.

    Attributes:
        halo: keys and values of local heads just before other parts.
        sinks: keys and values of sink tokens.
        gather: keys and values of global heads.
        lent: queries of global heads, and outputs that go back.
    """

    halo: float
    sinks: float
    gather: float
    lent: float

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.halo + self.sinks + self.gather + self.lent

    @classmethod
    def mean(cls, traffic: list[Traffic]) -> Traffic:
        """Return the mean over ranks."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: sum(getattr(one, name) for one in traffic) / len(traffic) for name in names})


def layer_traffic(
    layout: HeadLayout,
    head_dim: int,
    itemsize: int,
    length: int,
    ranks: int,
    *,
    batch: int = 1,
    lent_rows: float = 0,
) -> Traffic:
    """Compute the mean bytes that a rank sends, for sequences that are one segment each.

    Args:
        layout: the layout of the layer.
        head_dim: width of a head.
        itemsize: bytes of a number.
        length: tokens of a sequence; padding to a multiple of `ranks` is added.
        ranks: number of parts.
        batch: sequences.
        lent_rows: queries of one head that are lent, of all ranks together: `ContextPlan.lent_rows`.

    Raises:
        ValueError: a number is out of its range.
    """
    for name, value in (
        ("head_dim", head_dim), ("itemsize", itemsize), ("length", length), ("ranks", ranks),
        ("batch", batch),
    ):  # fmt: skip
        require_integer(name, value, minimum=1)
    part = -(-length // ranks)
    size = batch * head_dim * itemsize
    halo = sinks = gather = 0.0
    for group in layout.groups:
        heads = len(group.kv_heads)
        if group.window is None:
            gather += 2 * heads * size * part * (ranks - 1)
            continue
        reach = [min(group.window - 1, rank * part) for rank in range(ranks)]
        before = [min(layout.sink_tokens, rank * part - keys) for rank, keys in enumerate(reach)]
        halo += 2 * heads * size * sum(reach) / ranks
        sinks += 2 * heads * size * sum(before) / ranks
    lent = 2 * len(layout.global_heads) * head_dim * itemsize * lent_rows / ranks
    return Traffic(halo=halo, sinks=sinks, gather=gather, lent=lent)


def all_gather_bytes(
    layout: HeadLayout, head_dim: int, itemsize: int, length: int, ranks: int, *, batch: int = 1
) -> int:
    """Compute the bytes that a rank sends if the keys and values of all heads are gathered, or go round a
    ring."""
    part = -(-length // ranks)
    return 2 * layout.num_kv_heads * batch * head_dim * itemsize * part * (ranks - 1)

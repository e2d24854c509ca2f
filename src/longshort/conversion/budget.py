"""Budgets: how many heads may keep the distance, how much the loss may rise, how large the cache may be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longshort.checks import require_integer, require_positive

if TYPE_CHECKING:
    from longshort.conversion.heads import DecoderHeads


@dataclass(frozen=True)
class KeepHeads:
    """Let at most a share of the key/value heads see everything.

    Attributes:
        share: 0 … 1, of the heads that may become local.
    """

    share: float

    def __post_init__(self) -> None:
        if (
            isinstance(self.share, bool)
            or not isinstance(self.share, int | float)
            or not 0 <= self.share <= 1
        ):
            raise ValueError(f"share must be a number in 0 … 1, got {self.share!r}")

    def most_heads(self, heads: DecoderHeads, window: int, sink_tokens: int) -> int:
        """Return how many heads may be global."""
        return math.floor(self.share * len(heads.candidates) + 1e-9)

    def __str__(self) -> str:
        return f"{100 * self.share:.4g} % of the key/value heads"


@dataclass(frozen=True)
class LimitCache:
    """Let the cache of one sequence take at most a number of bytes.

    Attributes:
        size: bytes.
        length: tokens in the cache.
        itemsize: bytes of a number in it, 2 for bf16.
        name: the name of the size, in messages.
    """

    size: int
    length: int
    itemsize: int = 2
    name: str = field(default="size", compare=False, repr=False)

    def __post_init__(self) -> None:
        require_integer(self.name, self.size, minimum=1)
        require_integer("length", self.length, minimum=1)
        require_integer("itemsize", self.itemsize, minimum=1)

    def most_heads(self, heads: DecoderHeads, window: int, sink_tokens: int) -> int:
        """Return how many heads may be global, whichever they are.

        Raises:
            ValueError: the cache is larger even if every head is local.
        """
        local = heads.cache_bytes(heads.layouts((), window, sink_tokens), self.length, self.itemsize)
        if local > self.size:
            raise ValueError(
                f"{self.name} must be at least {local:,} bytes, the cache of {self.length:,} tokens if all "
                f"heads are local with a window of {window} and {sink_tokens} sink tokens, got {self.size:,}"
            )
        costs = sorted(
            heads.cache_bytes(heads.layouts((head,), window, sink_tokens), self.length, self.itemsize) - local
            for head in heads.candidates
        )
        total, most = local, 0
        for cost in reversed(costs):  # the most expensive first, so that any choice of this many heads fits
            total += cost
            if total > self.size:
                break
            most += 1
        return most

    def __str__(self) -> str:
        return f"a cache of at most {self.size:,} bytes at {self.length:,} tokens"


@dataclass(frozen=True)
class LimitRise:
    """Let the loss rise by a limited number of nats per token, with as few global heads as possible.

    Attributes:
        nats: the largest rise, nats per token; more than 0.
    """

    nats: float

    def __post_init__(self) -> None:
        require_positive("nats", self.nats)

    def __str__(self) -> str:
        return f"a rise of the loss by at most {self.nats:g} nats per token"


Budget = KeepHeads | LimitCache | LimitRise


def parse_share(name: str, text: str) -> KeepHeads:
    """Parse a share of heads, such as "25%" or "0.25".

    Raises:
        ValueError: the text is no share between 0 and 1; the message starts with `name`.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else math.inf
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be a share such as 25% or 0.25, got {text!r}")
    return KeepHeads(share)

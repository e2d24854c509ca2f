"""Agreement of ranks on a call, before it exchanges anything: what differs would hang or mix up numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from longshort.distributed.exchange import gather

_LONGEST = 500  # characters of a value in a message


def require_agreement(facts: Mapping[str, Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise on every rank unless the facts are equal on all of them. All ranks must call it.

    Args:
        facts: anything with a `repr`, by the name of the argument; of the same names everywhere.
        group: the ranks.
        device: device that the group's backend serves; a GPU is waited for.

    Raises:
        ValueError: a fact differs; the message names it, and the ranks that hold each value.
    """
    told = {name: repr(value) for name, value in facts.items()}
    text, in_order = json.dumps(told).encode(), json.dumps(told, sort_keys=True).encode()
    digest = int.from_bytes(hashlib.sha256(in_order).digest()[:7], "little")
    mine = torch.tensor([digest, len(text)], device=device)
    both = gather(mine, group).cpu()
    if bool((both == both[0]).all()):
        return
    longest = int(both[:, 1].max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = gather(padded.to(device), group).cpu()
    found = [
        json.loads(bytes(row[:size].tolist())) for row, size in zip(texts, both[:, 1].tolist(), strict=True)
    ]
    raise ValueError(describe_difference(found))


def describe_difference(found: list[dict[str, str]]) -> str:
    """Return a sentence on the first fact that is not the same on all ranks, which hold `found` in order."""
    for name in dict.fromkeys(name for one in found for name in one):
        holders: dict[str, list[int]] = {}
        for rank, one in enumerate(found):
            holders.setdefault(one.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            parts = [f"{_shortened(value)} on {_ranks(ranks)}" for value, ranks in holders.items()]
            return f"{name} must be the same on all ranks, got {' and '.join(parts)}"
    raise AssertionError("nothing differs")


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

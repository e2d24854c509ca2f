"""Windows of text for measurements: parts of a corpus that share no token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longshort.checks import require_integer
from longshort.data import open_corpus
from longshort.data.tokenization import Encoder

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_BATCH = 1 << 20
_HELD_OUT = 0.3


def read_tokens(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " tokens"]:
    """Read the texts of a corpus end to end, an end-of-text token after each.

    Args:
        source: a file, a folder or another source of `longshort.data.open_corpus`.
        tokenizer: the model's.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: the tokenizer has no end-of-text token, or the source holds no text.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-text token (eos_token), got one without")
    encoder = Encoder(tokenizer)
    pieces: list[Tensor] = []
    batch: list[str] = []
    end = torch.tensor([tokenizer.eos_token_id])

    def encode() -> None:
        for ids in encoder.encode(batch):
            pieces.extend((torch.from_numpy(ids.astype("int64")), end))
        batch.clear()

    for document in open_corpus(str(source)):
        batch.append(document.text)
        if sum(map(len, batch)) >= _CHARACTERS_PER_BATCH:
            encode()
    encode()
    if not pieces:
        raise ValueError(f"{source} must hold text, got none")
    return torch.cat(pieces)


def cut_parts(
    tokens: Int64[Tensor, " tokens"], length: int, counts: Sequence[int], first: int | None = None
) -> list[Int64[Tensor, "count length"]]:
    """Cut windows out of consecutive parts of a text, one part per entry of `counts`.

    Each part has the same number of tokens per window, and its windows are spread evenly over it. So no two
    windows share a token, and those of two parts come from different stretches of the text.

    Args:
        tokens: the text.
        length: tokens per window.
        counts: windows of each part.
        first: a token in front of each window, within its length; None: no such token.

    Raises:
        ValueError: length < 2, a count < 1, or the text is too short.
    """
    require_integer("length", length, minimum=2)
    for count in counts:
        require_integer("every entry of counts", count, minimum=1)
    taken = length if first is None else length - 1
    needed = sum(counts) * taken
    if needed > len(tokens):
        raise ValueError(
            f"text must have at least {needed:,} tokens for {sum(counts)} windows of {length:,}, "
            f"got {len(tokens):,}"
        )
    stride = len(tokens) // sum(counts)
    parts, begin = [], 0
    for count in counts:
        windows = torch.stack(
            [tokens[start : start + taken] for start in range(begin, begin + count * stride, stride)]
        )
        if first is not None:
            windows = torch.cat([torch.full((count, 1), first), windows], dim=1)
        parts.append(windows)
        begin += count * stride
    return parts


def split_held_out(
    tokens: Int64[Tensor, " tokens"],
) -> tuple[Int64[Tensor, " tokens"], Int64[Tensor, " tokens"]]:
    """Split a text into a part for inspections, and its end, which reports of conversions read."""
    end = round((1 - _HELD_OUT) * len(tokens))
    return tokens[:end], tokens[end:]

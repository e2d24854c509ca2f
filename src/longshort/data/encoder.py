"""Encoding of texts by a serialized tokenizer, long ones in pieces; as a program, for another process.

This file imports numpy and tokenizers alone: `longshort.data.processes` runs it by its path, so that a
process starts in a fraction of the time that `import longshort` takes.

tokenizers needs about 130 bytes of memory per character of one text, so a long text is cut where that
provably changes no token: between an ASCII letter and a space or line feed after it. In the known patterns
no match holds a letter with white space after it, so a match ends there in the whole text too. Every match
before it is decided by the characters before it: a run of letters ends there either way, and the one
look-ahead, `\\s+(?!\\S)`, looks at most at the letter. No match looks back, so those after it are found from
a new beginning too. Byte-level BPE then encodes each match by itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_PIECE_CHARACTERS = 1 << 16
_BATCH_PIECES = 16
_CUT = re.compile(r"[A-Za-z](?=[ \n])")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = tuple(
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_REST}"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
"""The patterns of Llama 3 (and cl100k) and of Qwen 2. That of GPT-2 is in `ByteLevel(use_regex=True)`."""


class TextEncoder:
    """An encoder of plain text to token ids: special tokens are neither added nor recognised in the text.

    Args:
        serialized: a tokenizer, as `Tokenizer.to_str` gives it.
        is_bytes: whether its ids of plain text are the UTF-8 bytes.
    """

    def __init__(self, serialized: str, is_bytes: bool) -> None:
        self.serialized = serialized
        self.is_bytes = is_bytes
        self._backend = Tokenizer.from_str(serialized)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._can_cut = can_be_cut(serialized)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Encode texts; returns one array of ids for each."""
        if self.is_bytes:  # the same ids as below, in a hundredth of the time and memory
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        is_long = [self._can_cut and len(text) > _PIECE_CHARACTERS for text in texts]
        short = iter(self._encode([text for text, long in zip(texts, is_long, strict=True) if not long]))
        return [
            self._encode_long(text) if long else next(short)
            for text, long in zip(texts, is_long, strict=True)
        ]

    def _encode_long(self, text: str) -> NDArray[np.unsignedinteger]:
        ends = [*cuts(text), len(text)]
        encoded: list[NDArray[np.unsignedinteger]] = []
        start = 0
        for first in range(0, len(ends), _BATCH_PIECES):  # a few at a time, for the sake of memory
            pieces = []
            for end in ends[first : first + _BATCH_PIECES]:
                pieces.append(text[start:end])
                start = end
            encoded += self._encode(pieces)
        return np.concatenate(encoded)

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def can_be_cut(serialized: str) -> bool:
    """Return whether it is proven that cutting at `cuts` changes no token of this tokenizer."""
    parts = json.loads(serialized)
    model, normalizer = parts["model"], parts["normalizer"]
    steps = _steps(parts["pre_tokenizer"])
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and (
            normalizer is None or normalizer["type"] == "NFC"
        )  # no character composes with a space before it
        and all(map(_is_safe, steps))
        and any(_splits_before_space(step) for step in steps)
        and all(token["special"] or _stays_in_one_piece(token) for token in parts["added_tokens"])
    )


def cuts(text: str) -> Iterator[int]:
    """Yield the places where a text is cut into pieces of at least 65,536 characters, the last one excepted.

    A piece is longer where there is no letter with a space or line feed after it.
    """
    start = 0
    while found := _CUT.search(text, start + _PIECE_CHARACTERS - 1):
        start = found.end()
        yield start


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer]


def _is_safe(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] == "Digits" or _splits_before_space(step)


def _splits_before_space(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True)) and not step["add_prefix_space"]
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _PATTERNS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _stays_in_one_piece(token: dict[str, Any]) -> bool:
    """Return whether an added token, which is recognised in the text, cannot reach over a cut."""
    return not (
        token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"])
    )


def write_blocks(stream: IO[bytes], blocks: Sequence[bytes | memoryview]) -> None:
    """Write blocks so that `read_blocks` gives them back: their number, their lengths, their bytes."""
    lengths = np.array([len(blocks), *map(len, blocks)], dtype="<i8")
    stream.write(lengths.tobytes())
    stream.writelines(blocks)
    stream.flush()


def read_blocks(stream: IO[bytes]) -> list[bytes]:
    """Read the blocks of one `write_blocks`.

    Raises:
        EOFError: the stream ends before or within them.
    """
    (count,) = np.frombuffer(_read(stream, 8), dtype="<i8").tolist()
    lengths = np.frombuffer(_read(stream, 8 * count), dtype="<i8").tolist()
    return [_read(stream, length) for length in lengths]


def _read(stream: IO[bytes], length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise EOFError("the stream ended")
    return content


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer texts with their ids, as uint32, until the requests end, as they do when their sender dies."""
    (serialized,) = read_blocks(requests)
    encoder = TextEncoder(serialized.decode(), is_bytes=False)
    while True:
        try:
            texts = [block.decode() for block in read_blocks(requests)]
        except EOFError:
            return
        write_blocks(answers, [ids.astype("<u4").tobytes() for ids in encoder.encode(texts)])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process decides
    try:
        _serve(sys.stdin.buffer, sys.stdout.buffer)
    except (BrokenPipeError, EOFError):
        os._exit(1)  # without flushing what nobody reads

"""Tokenizers: bytes, byte-level BPE trained on the corpus, or any saved Hugging Face tokenizer.

All are `PreTrainedTokenizerFast`, written by `save_pretrained`, so that `AutoTokenizer` reads them back.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from longshort.data.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE_VOCABULARY = 258
"""256 bytes, one merge, and the end-of-text token."""
_NO_MAX_LENGTH = int(1e30)  # transformers' own value for a tokenizer without a limit
_LONGEST_TRAINING_WORD = 256  # bytes
_PARALLELISM = "TOKENIZERS_PARALLELISM"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer whose ids are UTF-8 bytes, and 256 for `<|endoftext|>`. Every text round-trips."""
    return _wrap(_byte_backend())


def train_bpe(texts: Iterable[str] | Iterable[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every text round-trips. `<|endoftext|>` has the last id.

    Args:
        texts: texts, or lists of texts, read once. Memory grows only with the number of distinct words.
        vocab_size: number of pieces, the 256 bytes and `<|endoftext|>` included; a small corpus gives fewer.

    Raises:
        ValueError: `vocab_size` < 258.
    """
    if vocab_size < SMALLEST_BPE_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_BPE_VOCABULARY} for BPE, got {vocab_size}")
    _disable_threads_in_forks()
    backend = _byte_level(models.BPE(), use_regex=True)
    words = backend.pre_tokenizer
    # A merge takes time quadratic in the length of a word, and texts may hold "words" of megabytes.
    cut = pre_tokenizers.FixedLength(_LONGEST_TRAINING_WORD)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, cut])  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # pyright: ignore[reportCallIssue]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = words
    backend.add_special_tokens([_end_of_text()])
    return _wrap(backend)


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load a saved tokenizer, without its length limit: this package cuts texts itself.

    A tokenizer without an end-of-text token (eos_token), which follows every document, gets a new one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no tokenizer, or one without a fast form.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"tokenizer: there is no folder {os.fspath(folder)!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers meet
        raise ValueError(
            f"tokenizer: {os.fspath(folder)!r} holds no tokenizer that loads: {error}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer: {os.fspath(folder)!r} is a {type(tokenizer).__name__}, "
            "which has no fast form (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    tokenizer.model_max_length = _NO_MAX_LENGTH
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of rows that an embedding needs: the largest id + 1, even if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that a tokenizer puts before every text, its bos_token; None if it puts none there."""
    added = tokenizer("").input_ids
    return added[0] if added and added[0] == tokenizer.bos_token_id else None


def tokenizer_hash(folder: str | os.PathLike[str]) -> str:
    """Return the SHA-256, in hexadecimal, of the saved tokenizer's `tokenizer.json`."""
    return hashlib.sha256(Path(folder, "tokenizer.json").read_bytes()).hexdigest()


class Encoder(TextEncoder):
    """An encoder of plain text to token ids: special tokens are neither added nor recognised in the text.

    Raises:
        ValueError: the tokenizer has no fast form.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers import PreTrainedTokenizerFast

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"tokenizer must have a fast form (tokenizer.json), got a {type(tokenizer).__name__}"
            )
        _disable_threads_in_forks()
        # A copy, since an encoder's settings must not change the user's tokenizer.
        serialized = tokenizer.backend_tokenizer.to_str()
        super().__init__(serialized, is_bytes=_pipeline(serialized) == _pipeline(_byte_backend().to_str()))


def _byte_symbols() -> list[str]:
    """Return the character of each byte in byte-level vocabularies; printable bytes are themselves."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_backend() -> Tokenizer:
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
    backend.add_special_tokens([_end_of_text()])
    return backend


def _pipeline(serialized: str) -> dict[str, Any]:
    """Return the parts of a serialized tokenizer that determine how plain text is encoded."""
    parts = json.loads(serialized)
    return {part: parts[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")}


def _byte_level(model: models.BPE, use_regex: bool) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False, use_regex=use_regex
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _end_of_text() -> AddedToken:
    return AddedToken(END_OF_TEXT, special=True, normalized=False)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_end_of_text(),
        eos_token=_end_of_text(),
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _disable_threads_in_forks() -> None:
    """Make forked children, which have no thread pool, encode serially; tokenizers would also warn of it."""
    inserted = False

    def before() -> None:
        nonlocal inserted
        inserted = _PARALLELISM not in os.environ
        os.environ.setdefault(_PARALLELISM, "false")

    def after_in_parent() -> None:
        if inserted:
            os.environ.pop(_PARALLELISM, None)

    os.register_at_fork(before=before, after_in_parent=after_in_parent)

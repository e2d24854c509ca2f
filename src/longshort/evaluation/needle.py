"""Retrieval from a distance, by models that were never trained on it: a needle in a window of text.

A window of text contains a line with a random key and value, the needle, and ends with the same line once
more, of which the last letters of the value are scored:

    text … KUDQXE = "mfkwcjhtbnpa" … text … KUDQXE = "mfkwcjhtbnpa
                                                          ────────

Those letters are scored a second time in a window that differs only in the needle's value. Whatever else
helps is in both windows, so the gain from one to the other is what the model retrieves. A model that has
learnt to continue a text as it continued before (induction) can do this without having seen the task, as far
back as it sees.

The pieces of a line are encoded one by one. A tokenizer that begins each text with a space, as many do, puts
one before each piece, and so within the value, too.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longshort.checks import require_integer
from longshort.data import TokenFile
from longshort.data.tokenization import Encoder, first_token, vocabulary_size
from longshort.evaluation.positions import decoder_config, position_limit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_KEY_LETTERS, _VALUE_LETTERS, _SHOWN_LETTERS = 6, 12, 4
_TOKENS_PER_BATCH = 8192
_MOST_DRAWS = 1000


@dataclass(frozen=True)
class NeedleCell:
    """Needles at one depth in windows of one length.

    Attributes:
        length: tokens of a window.
        depth: share of the text around the needle that is before it.
        distance: tokens from a scored token back to its copy in the needle, mean over the samples. A head
            whose window is at least this long sees the copy when the token is predicted.
        gain: how much more likely the needle makes a scored token, nats per token, mean over the samples.
        gain_error: standard error of `gain` over the samples.
        accuracy: share of the scored tokens that the model finds the likeliest, with the needle.
        samples: pairs of windows.
    """

    length: int
    depth: float
    distance: float
    gain: float
    gain_error: float
    accuracy: float
    samples: int


@dataclass(frozen=True)
class NeedleResult:
    """The result of `measure_needle`.

    Attributes:
        cells: for each length, in the order given, one for each depth.
    """

    cells: list[NeedleCell]


@dataclass(frozen=True)
class _Sample:
    """Token ids of one sample. The pieces of a line are encoded one by one, so that they are the same ids in
    needle and question."""

    opening: NDArray[np.int64]  # a line break, the key and the quotation mark
    shown: NDArray[np.int64]  # the value's first letters
    scored: NDArray[np.int64]  # and its last ones
    other_value: NDArray[np.int64]  # as many tokens as the value
    closing: NDArray[np.int64]
    text: NDArray[np.int64]  # fills the window up to length + 1 tokens
    first: NDArray[np.int64]  # the token that every text begins with, or none

    def window(self, depth: float, has_needle: bool) -> NDArray[np.int64]:
        """Build the window with the needle, or with the other value, and the last label: (length + 1,)."""
        value = [self.shown, self.scored] if has_needle else [self.other_value]
        before, after = np.split(self.text, [self.place(depth)])
        needle = [self.opening, *value, self.closing]
        return np.concatenate([self.first, before, *needle, after, self.opening, self.shown, self.scored])

    def place(self, depth: float) -> int:
        """Return the tokens of text before the needle."""
        return round(depth * len(self.text))

    def distance(self, depth: float) -> int:
        """Return the tokens from a scored token back to its copy."""
        after = len(self.text) - self.place(depth)
        return len(self.scored) + len(self.closing) + after + len(self.opening) + len(self.shown)


@dataclass(frozen=True)
class _Score:
    log_probability: float  # mean over the scored tokens, nats
    hits: int  # scored tokens that the model finds the likeliest


def measure_needle(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    token_file: TokenFile | NDArray[np.integer],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    batch_size: int | None = None,
) -> NeedleResult:
    """Measure how well a model retrieves needles from windows of a text, as described in this module.

    Keys, values and text are drawn for each length and sample; the depths share them, and so do models that
    are measured with one seed. The text of a window is cut anywhere and may span documents.

    Args:
        model: any causal language model of transformers, or one with `model(input_ids, use_cache=…).logits`
            and a `config.vocab_size`, on any device; it is left in the mode it was in. Its precision is the
            caller's choice (`torch.autocast`).
        tokenizer: the model's; every text must have an encoding. Windows begin with the token that it puts
            before every text, if there is one.
        token_file: the text, preferably the validation split; or its token ids, (tokens,).
        lengths: tokens per window, including the question and all scored tokens but the last.
        depths: 0 … 1, places of the needle: 0 before all of the text, 1 right before the question.
        samples: pairs of windows per length and depth, at least 2.
        seed: seed of keys, values and text.
        batch_size: windows per forward pass; None: about 8192 tokens.

    Raises:
        ValueError: a value is out of range, a length exceeds the model's learned positions or is too short
            for needle, question and text, the vocabulary exceeds the model's, the file is too short, or the
            tokenizer does not tell letters apart.
    """
    drawn = _draw_all(model, tokenizer, token_file, lengths, depths, samples, seed, batch_size)
    was_training = model.training
    model.eval()
    try:
        return NeedleResult(
            [
                _measure(model, drawn[length], length, float(depth), batch_size)
                for length in lengths
                for depth in depths
            ]
        )
    finally:
        model.train(was_training)


def check_needle(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    token_file: TokenFile | NDArray[np.integer],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
) -> None:
    """Raise the errors that `measure_needle` would raise of these arguments, without a pass of the model.

    Raises:
        ValueError: as for `measure_needle`.
    """
    _draw_all(model, tokenizer, token_file, lengths, depths, samples, seed, None)


def _draw_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    token_file: TokenFile | NDArray[np.integer],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    batch_size: int | None,
) -> dict[int, list[_Sample]]:
    """Check the arguments of `measure_needle`, and draw its samples by length."""
    _check(model, tokenizer, token_file, lengths, depths, batch_size)
    require_integer("samples", samples, minimum=2)
    require_integer("seed", seed, minimum=0)
    encoder = Encoder(tokenizer)
    tokens = token_file.tokens if isinstance(token_file, TokenFile) else token_file
    added = first_token(tokenizer)
    first = np.array([] if added is None else [added], dtype=np.int64)
    return {
        length: [
            _draw(encoder, tokens, first, length, np.random.default_rng([seed, length, index]))
            for index in range(samples)
        ]
        for length in dict.fromkeys(lengths)
    }


def _check(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    token_file: TokenFile | NDArray[np.integer],
    lengths: Sequence[int],
    depths: Sequence[float],
    batch_size: int | None,
) -> None:
    limit = position_limit(model)
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{name} must be a list or tuple with at least one entry, got {values!r}")
    for length in lengths:
        require_integer("every entry of lengths", length, minimum=1)
        if limit is not None and length > limit:
            raise ValueError(f"lengths must be at most {limit}, the model's learned positions, got {length}")
    for depth in depths:
        if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
            raise ValueError(f"every entry of depths must be a number in 0 … 1, got {depth!r}")
    if batch_size is not None:
        require_integer("batch_size", batch_size, minimum=1)
    if isinstance(token_file, TokenFile):
        largest = token_file.vocab_size
    elif isinstance(token_file, np.ndarray) and token_file.ndim == 1 and token_file.dtype.kind in "iu":
        largest = 1 + int(token_file.max(initial=0))
    else:
        raise ValueError(
            f"token_file must be a TokenFile or token ids, (tokens,), got {type(token_file).__name__}"
        )
    held = decoder_config(model).vocab_size
    for name, size in {"tokenizer": vocabulary_size(tokenizer), "token_file": largest}.items():
        if size > held:
            raise ValueError(f"{name} has a vocabulary of {size}, but the model one of {held}")


def _draw(
    encoder: Encoder,
    tokens: NDArray[np.integer],
    first: NDArray[np.int64],
    length: int,
    generator: np.random.Generator,
) -> _Sample:
    def letters(alphabet: str, count: int) -> str:
        return "".join(alphabet[index] for index in generator.integers(len(alphabet), size=count))

    def encode(*texts: str) -> list[NDArray[np.int64]]:
        return [ids.astype(np.int64) for ids in encoder.encode(texts)]

    def encode_value() -> list[NDArray[np.int64]]:
        value = letters(ascii_lowercase, _VALUE_LETTERS)
        return encode(value[:_SHOWN_LETTERS], value[_SHOWN_LETTERS:])

    opening, closing = encode(f'\n{letters(ascii_uppercase, _KEY_LETTERS)} = "', '"\n')
    shown, scored = encode_value()
    for _ in range(_MOST_DRAWS):
        other_shown, other_scored = encode_value()
        other_value = np.concatenate([other_shown, other_scored])
        is_as_long = len(other_value) == len(shown) + len(scored)
        if is_as_long and not np.array_equal(other_value[len(shown) :], scored):
            break
    else:
        raise ValueError(
            "tokenizer must encode random letters as tokens that tell them apart, got one that gives "
            f"{scored.tolist()} for many"
        )
    taken = len(first) + 2 * (len(opening) + len(shown) + len(scored)) + len(closing)
    size = length + 1 - taken
    if size < 1:
        raise ValueError(f"lengths must be at least {taken}, the tokens of needle and question, got {length}")
    if size > len(tokens):
        raise ValueError(
            f"token_file must hold at least {size} tokens for windows of {length}, got {len(tokens)}"
        )
    start = int(generator.integers(len(tokens) - size + 1))
    text = tokens[start : start + size].astype(np.int64)
    return _Sample(opening, shown, scored, other_value, closing, text, first)


def _measure(
    model: nn.Module, samples: Sequence[_Sample], length: int, depth: float, batch_size: int | None
) -> NeedleCell:
    windows = [(sample, has_needle) for sample in samples for has_needle in (True, False)]
    size = batch_size or max(1, _TOKENS_PER_BATCH // length)
    scores = [
        score
        for first in range(0, len(windows), size)
        for score in _score(model, depth, windows[first : first + size])
    ]
    with_needle, without = scores[0::2], scores[1::2]
    gains = np.array(
        [a.log_probability - b.log_probability for a, b in zip(with_needle, without, strict=True)]
    )
    return NeedleCell(
        length=length,
        depth=depth,
        distance=float(np.mean([sample.distance(depth) for sample in samples])),
        gain=float(gains.mean()),
        gain_error=float(gains.std(ddof=1)) / math.sqrt(len(gains)),
        accuracy=sum(score.hits for score in with_needle) / sum(len(sample.scored) for sample in samples),
        samples=len(samples),
    )


@torch.no_grad()
def _score(model: nn.Module, depth: float, windows: Sequence[tuple[_Sample, bool]]) -> list[_Score]:
    """Score windows by one forward pass."""
    tokens = np.stack([sample.window(depth, has_needle) for sample, has_needle in windows])
    on_device = torch.from_numpy(tokens).to(next(model.parameters()).device)
    counts = [len(sample.scored) for sample, _ in windows]
    takes_it = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": max(counts)} if takes_it else {}
    logits = model(on_device[:, :-1], use_cache=False, **options).logits[:, -max(counts) :].float()
    labels = on_device[:, -max(counts) :]
    log_probabilities = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1).cpu()
    hits = (logits.argmax(-1) == labels).cpu()
    return [
        _Score(log_probabilities[row, -count:].mean().item(), int(hits[row, -count:].sum()))
        for row, count in enumerate(counts)
    ]

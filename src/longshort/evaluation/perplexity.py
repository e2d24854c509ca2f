"""Loss, perplexity and bits per byte of a causal language model over whole documents.

A document t_0 … t_{L-1} is read as the sequence E, t_0, …, t_{L-1}, E with E the end-of-text token: the E
before it predicts its first token, and the E after it is scored too, as in training. So the scored tokens are
a complete code of the document, its end included, and bits per byte = nats of all scored tokens / ln 2 /
bytes of the documents can be compared across tokenizers.

A document longer than the context is read in windows that overlap by half. Each token is scored once, in the
first window that holds it, with at least half a context before it, or the whole beginning of the document.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from longshort.checks import require_integer
from longshort.data import begins_with_end_of_text, document_segments
from longshort.evaluation.positions import position_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float, Int
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from longshort.data import DocumentStart, TokenFile
    from longshort.distributed import ContextParallel

_IGNORED = -100  # cross_entropy's label of a token that is not scored
_POSITION_BINS = 24
_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the tokens with `first + 1` to `last + 1` tokens of context.

    Attributes:
        first, last: positions in the window of the token that makes the prediction, from 0, both included.
        loss: nats per token.
        tokens: how many tokens were scored there.
    """

    first: int
    last: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_documents`.

    Attributes:
        loss: mean over all scored tokens, nats per token.
        perplexity: exp(loss), per token of this tokenizer.
        bits_per_byte: nats of all scored tokens / ln 2 / bytes.
        tokens: scored tokens, including the end-of-text token of each document.
        bytes: bytes of the documents' text.
        documents: scored documents.
        context_length: tokens per window.
        loss_by_position: the loss by position in the window: single positions, then ranges of growing width.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    context_length: int
    loss_by_position: list[PositionLoss]


class Window(NamedTuple):
    """Inputs start … end - 1 of a sequence; the predictions of scored … end - 1 are scored in this window."""

    start: int
    end: int
    scored: int


def split_into_windows(length: int, context_length: int) -> Iterator[Window]:
    """Yield windows over a sequence of `length` inputs, each `context_length // 2` after the one before.

    Each of 0 … length - 1 is scored in one window, and a window after the first scores only predictions that
    have more than half a context.

    Raises:
        ValueError: one of the two is not an integer >= 1.
    """
    require_integer("length", length, minimum=1)
    require_integer("context_length", context_length, minimum=1)
    stride = max(1, context_length // 2)
    start = scored = 0
    while scored < length:
        end = min(start + context_length, length)
        yield Window(start, end, scored)
        start, scored = start + stride, end


def evaluate_documents(
    model: nn.Module,
    token_file: TokenFile,
    *,
    context_length: int,
    batch_size: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    separate_documents: bool = False,
    document_start: DocumentStart = "at-end-of-text",
    context: ContextParallel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score whole documents, from the first on, as described in this module.

    Args:
        model: a causal language model: `model(input_ids).logits`, on any device; it is left in the mode it
            was in. Its precision is the caller's choice (`torch.autocast`); losses are computed in fp32 and
            summed in fp64.
        token_file: its documents end with the end-of-text token.
        context_length: tokens per window.
        batch_size: windows per forward pass; None: about 8192 tokens. It does not change the result.
        max_documents: the most documents to score.
        max_tokens: tokens into which the scored documents must fit; the first is always taken.
        separate_documents: the model was trained so that no document sees the one before it; it must take
            segment ids.
        document_start: where separate documents began in that training. With "after-end-of-text" they did
            not see the end-of-text token before them; here it then only predicts the first token.
        context: ranks that share each window, for a model that was given to its `distribute`; all of them
            must call this, and get the same result.
        progress: called after each pass with the number of tokens scored so far, and of all.

    Raises:
        ValueError: a number is out of range, the context exceeds the model's learned positions, the file's
            vocabulary exceeds the model's, or the documents hold no text.
    """
    require_integer("context_length", context_length, minimum=1)
    for name, value in (
        ("batch_size", batch_size),
        ("max_documents", max_documents),
        ("max_tokens", max_tokens),
    ):
        if value is not None:
            require_integer(name, value, minimum=1)
    begins_with_end_of_text(document_start)  # checks it
    limit = position_limit(model)
    if limit is not None and context_length > limit:
        raise ValueError(
            f"context_length must be at most {limit}, the model's learned positions, got {context_length}"
        )
    config: Any = model.config
    vocab_size = config.vocab_size
    if token_file.vocab_size > vocab_size:
        raise ValueError(
            f"token_file has a vocabulary of {token_file.vocab_size}, but the model one of {vocab_size}: "
            "it was trained with another tokenizer"
        )
    documents = _count_documents(token_file, max_documents, max_tokens)
    text_bytes = int(token_file.document_bytes[:documents].sum())
    if text_bytes == 0:
        raise ValueError(
            f"token_file must hold text, the first {documents} documents of {token_file.path} are empty"
        )
    total = int(token_file.document_offsets[documents])

    cut_at = document_start if separate_documents else None
    sums = torch.zeros(context_length, dtype=torch.float64)
    counts = torch.zeros(context_length, dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for losses, scored in _losses(
            model, token_file, documents, context_length, batch_size, cut_at, context
        ):
            width = losses.shape[1]
            sums[:width] += losses.sum(0, dtype=torch.float64).cpu()
            counts[:width] += scored.sum(0).cpu()
            if progress is not None:
                progress(int(counts.sum()), total)
    finally:
        model.train(was_training)
    assert int(counts.sum()) == total
    nats = float(sums.sum())
    loss = nats / total
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 709 else loss * math.inf,
        bits_per_byte=nats / math.log(2) / text_bytes,
        tokens=total,
        bytes=text_bytes,
        documents=documents,
        context_length=context_length,
        loss_by_position=_bin_positions(sums.numpy(), counts.numpy()),
    )


def _count_documents(token_file: TokenFile, max_documents: int | None, max_tokens: int | None) -> int:
    count = token_file.documents
    if max_documents is not None:
        count = min(count, max_documents)
    if max_tokens is not None:
        fitting = int(np.searchsorted(token_file.document_offsets[1:], max_tokens, side="right"))
        count = min(count, max(1, fitting))
    return count


@torch.no_grad()
def _losses(
    model: nn.Module,
    token_file: TokenFile,
    documents: int,
    context_length: int,
    batch_size: int | None,
    cut_at: DocumentStart | None,
    context: ContextParallel | None,
) -> Iterator[tuple[Float[Tensor, "batch width"], Int[Tensor, "batch width"]]]:
    """Yield, for each forward pass, the losses of the scored tokens, 0 elsewhere, and a mask of them."""
    device = next(model.parameters()).device
    batch_size = batch_size or max(1, _TOKENS_PER_BATCH // context_length)
    lengths = np.diff(token_file.document_offsets[: documents + 1])
    windows = [
        (document, window)
        for document, length in enumerate(lengths.tolist())
        for window in split_into_windows(length, context_length)
    ]
    windows.sort(key=lambda entry: entry[1].start - entry[1].end)  # similar lengths together, longest first
    for first in range(0, len(windows), batch_size):
        inputs, labels = _read_windows(token_file, windows[first : first + batch_size])
        segment_ids = None
        if cut_at is not None:
            positions = _positions(token_file, windows[first : first + batch_size], inputs.shape[1])
            segments = document_segments(token_file.document_offsets, positions, cut_at)
            segment_ids = torch.from_numpy(segments)
        losses = _token_losses(model, inputs, labels, segment_ids, device, context)
        yield losses, (labels != _IGNORED).long()


def _token_losses(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    segment_ids: Tensor | None,
    device: torch.device,
    context: ContextParallel | None,
) -> Float[Tensor, "batch width"]:
    """Compute the loss of each token, 0 where none is scored."""
    arguments: dict[str, Any] = {"input_ids": inputs, "segment_ids": segment_ids, "use_cache": False}
    with nullcontext() if context is None else context.sequence(len(inputs), inputs.shape[1], segment_ids):
        if context is not None:
            part = context.inputs(inputs, labels, segment_ids)
            labels = part.pop("shift_labels")
            del part["num_items_in_batch"]
            arguments = {"use_cache": False, **part}
        arguments = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
            if value is not None
        }
        logits = model(**arguments).logits
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.to(device).flatten(), ignore_index=_IGNORED, reduction="none"
    ).view_as(labels)
    return losses if context is None else context.whole(losses, inputs.shape[1])


def _read_windows(
    token_file: TokenFile, windows: Sequence[tuple[int, Window]]
) -> tuple[Int[Tensor, "batch width"], Int[Tensor, "batch width"]]:
    """Read input ids and labels. Shorter windows are padded at the end, which a causal model does not see."""
    width = max(window.end - window.start for _, window in windows)
    inputs = np.zeros((len(windows), width), dtype=np.int64)
    labels = np.full((len(windows), width), _IGNORED, dtype=np.int64)
    for row, (document, window) in enumerate(windows):
        begin, end = (int(offset) for offset in token_file.document_offsets[document : document + 2])
        size = window.end - window.start
        following = token_file.tokens[begin + window.start : begin + window.end]
        inputs[row, 1:size] = following[:-1]
        # A document's last token is the end-of-text token, which is also read before its first.
        inputs[row, 0] = token_file.tokens[end - 1 if window.start == 0 else begin + window.start - 1]
        labels[row, window.scored - window.start : size] = following[window.scored - window.start :]
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def _positions(token_file: TokenFile, windows: Sequence[tuple[int, Window]], width: int) -> NDArray[np.int64]:
    """Return the position of each input in the file, -1 before the first document: (windows, width)."""
    starts = [int(token_file.document_offsets[document]) + window.start - 1 for document, window in windows]
    return np.array(starts, dtype=np.int64)[:, None] + np.arange(width)


def _bin_positions(sums: np.ndarray, counts: np.ndarray) -> list[PositionLoss]:
    edges = np.unique(np.geomspace(1, len(sums) + 1, _POSITION_BINS + 1).round().astype(int)) - 1
    bins = []
    for first, after in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        tokens = int(counts[first:after].sum())
        if tokens:
            bins.append(PositionLoss(first, after - 1, float(sums[first:after].sum()) / tokens, tokens))
    return bins

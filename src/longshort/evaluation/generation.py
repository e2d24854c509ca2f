"""Text from a causal language model, piece by piece as it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from longshort.checks import require_integer
from longshort.data.documents import begins_with_end_of_text
from longshort.data.tokenization import Encoder
from longshort.evaluation.positions import position_limit
from longshort.huggingface import SplitCache
from longshort.huggingface.cache_name import CACHE_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from transformers.cache_utils import Cache

    from longshort.data import DocumentStart

_NEW_TOKENS = 200
_INCOMPLETE = "\ufffd"  # a decoder writes it for bytes that are not a character, or not yet


@dataclass
class GenerationStatistics:
    """The tokens, time and memory that a text took so far.

    Attributes:
        prompt_tokens: tokens that the model read before the text, including an end-of-text token in front.
        tokens: tokens that the model generated, including an end-of-text token.
        seconds_to_first_token: time for reading the prompt and choosing a token; None before there is one.
        seconds_after: time for the other tokens, without what the reader of the text does in between.
        cache_bytes: bytes of the keys and values that are kept; 0 without a cache.
    """

    prompt_tokens: int
    tokens: int = 0
    seconds_to_first_token: float | None = None
    seconds_after: float = 0.0
    cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """The speed after the first token; None if there are no other tokens."""
        return (self.tokens - 1) / self.seconds_after if self.tokens > 1 else None

    def add(self, seconds: float) -> None:
        """Count one more token and the seconds that it took."""
        self.tokens += 1
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token = seconds
        else:
            self.seconds_after += seconds


class GeneratedText(Iterator[str]):
    """An iterator over the pieces of a text, which are generated as they are read.

    Attributes:
        statistics: the cost of the text so far.
    """

    def __init__(self, pieces: Iterator[str], statistics: GenerationStatistics) -> None:
        self._pieces = pieces
        self.statistics = statistics

    def __next__(self) -> str:
        return next(self._pieces)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    separate_documents: bool = False,
    document_start: DocumentStart = "at-end-of-text",
    prefill_chunk: int | None = None,
) -> GeneratedText:
    """Continue a prompt that begins a document: it follows an end-of-text token, as in training.

    The arguments are checked, and the prompt encoded, in the call; the text is generated as it is read from
    the iterator. It ends after `max_new_tokens` tokens, or at the end-of-text token, which is not part of it.
    Pieces are whole characters: bytes of an incomplete one are held back. On a CPU the same arguments give
    the same text.

    Args:
        model: on any device; it is put in eval mode.
        tokenizer: the model's; has an `eos_token_id`.
        prompt: plain text, in which no special token is recognised; may be empty.
        max_new_tokens: at least 1; None: 200, or fewer if the model's learned positions allow no more.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens only; None: among all.
        seed: seed of the sampling.
        separate_documents: the model was trained so that no document sees the one before it.
        document_start: where separate documents began in that training. With "after-end-of-text" they did
            not see the end-of-text token before them, and neither does a prompt.
        prefill_chunk: number of prompt tokens to read at a time; fewer take less memory and give the same
            text. None: as many as the model takes at once.

    Returns:
        An iterator over pieces of text, none of them empty, without the prompt; it has statistics.

    Raises:
        TypeError: the prompt is not a string.
        ValueError: a value is out of range, prompt and new tokens together do not fit the model's learned
            positions, or prefill_chunk is given to a model with a short convolution, which has no cache.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
    if max_new_tokens is not None:
        require_integer("max_new_tokens", max_new_tokens, minimum=1)
    require_integer("seed", seed, minimum=0)
    if top_k is not None:
        require_integer("top_k", top_k, minimum=1)
    if prefill_chunk is not None:
        require_integer("prefill_chunk", prefill_chunk, minimum=1)
        if not _has_cache(model):
            raise ValueError(
                "prefill_chunk must be None for a model with a short_convolution, which keeps no state "
                f"between chunks, got {prefill_chunk}"
            )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number >= 0, got {temperature!r}")
    ids = Encoder(tokenizer).encode([prompt])[0].tolist()
    sees_end_of_text = begins_with_end_of_text(document_start) or not separate_documents
    if sees_end_of_text or not ids:
        ids = [tokenizer.eos_token_id, *ids]
    limit = position_limit(model)
    if max_new_tokens is None:
        max_new_tokens = _NEW_TOKENS if limit is None else max(1, min(_NEW_TOKENS, limit - len(ids)))
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens must be at most {max(0, limit - len(ids))} here, got {max_new_tokens}: the "
            f"model has learned {limit} positions, and the prompt takes {len(ids)} of them"
        )
    statistics = GenerationStatistics(len(ids))
    generator = torch.Generator(model.device).manual_seed(seed)
    choose = partial(_choose, temperature=temperature, top_k=top_k, generator=generator)
    tokens = _generate_tokens(
        model, ids, max_new_tokens, prefill_chunk, choose, tokenizer.eos_token_id, statistics
    )
    return GeneratedText(_stream(tokens, tokenizer), statistics)


@torch.no_grad()
def _generate_tokens(
    model: PreTrainedModel,
    ids: list[int],
    max_new_tokens: int,
    prefill_chunk: int | None,
    choose: Callable[[Tensor], int],
    end_of_text: Any,
    statistics: GenerationStatistics,
) -> Iterator[int]:
    model.eval()
    cache = _new_cache(model)
    if prefill_chunk is not None and isinstance(cache, SplitCache):
        cache.expect(len(ids))
    inputs = torch.tensor([ids], device=model.device)
    for _ in range(max_new_tokens):
        started = perf_counter()
        logits = None
        for part in inputs.split(prefill_chunk or inputs.shape[1], dim=1):
            outputs = model(part, use_cache=cache is not None, logits_to_keep=1, **{CACHE_NAME: cache})
            logits = outputs.logits[0, -1]
        assert logits is not None  # the prompt has at least the end-of-text token
        token = choose(logits.float())
        statistics.add(perf_counter() - started)
        statistics.cache_bytes = cache_bytes(cache)
        if token == end_of_text:
            return
        yield token
        new = torch.tensor([[token]], device=model.device)
        inputs = torch.cat([inputs, new], dim=1) if cache is None else new


def _has_cache(model: PreTrainedModel) -> bool:
    """Return whether the model can use a cache: not with a short convolution, which keeps no state, so that
    every token is computed again. `config.use_cache` does not show it: models trained with gradient
    checkpointing are saved with false."""
    return getattr(model.config, "short_convolution", None) is None


def _new_cache(model: PreTrainedModel) -> Cache | None:
    """Return the model's own kind of cache, else one that keeps every token."""
    from transformers import DynamicCache

    if not _has_cache(model):
        return None
    new_cache = getattr(model, "new_cache", None)
    return DynamicCache() if new_cache is None else new_cache()


def cache_bytes(cache: Cache | None) -> int:
    """Return the bytes of the keys and values in a cache; 0 without one."""
    if cache is None:
        return 0
    if isinstance(cache, SplitCache):
        return cache.nbytes_used
    kept = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


def _choose(
    logits: Float[Tensor, " vocab"], temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if logits.isnan().any():
        raise ValueError("model gives logits that are not numbers: its training has diverged")
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    # Relative to the largest logit, so that a tiny temperature gives no inf - inf.
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _stream(tokens: Iterator[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Decode tokens as they are generated, together with those before, on which some decoders depend."""
    before: list[int] = []
    pending: list[int] = []
    yielded = ""
    for token in tokens:
        pending.append(token)
        text = _decode(tokenizer, before, pending)
        whole = text.removesuffix(_INCOMPLETE)
        if len(whole) > len(yielded):
            yield whole[len(yielded) :]
            yielded = whole
        if whole == text:
            before, pending, yielded = pending, [], ""
    rest = _decode(tokenizer, before, pending)[len(yielded) :]
    if rest:
        yield rest


def _decode(tokenizer: PreTrainedTokenizerFast, before: list[int], pending: list[int]) -> str:
    context, text = (
        str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        for tokens in (before, before + pending)
    )
    return text[len(context) :]

"""Text from a causal language model, piece by piece as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longshort.data.tokenization import Encoder
from longshort.evaluation.positions import position_limit
from longshort.layout import require_integer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_NEW_TOKENS = 200
_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or not one yet


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
) -> Iterator[str]:
    """Continues a prompt that begins a document: it follows an end-of-text token, as in training.

    The arguments are checked, and the prompt encoded, in the call; the text is made while it is read from the
    iterator. It ends after `max_new_tokens` tokens, or at the end-of-text token, which is not part of it.
    Pieces are whole characters: bytes of one that is not complete yet are held back. On a CPU the same
    arguments give the same text.

    Args:
        model: on any device; it is put in eval mode.
        tokenizer: with an `eos_token_id`.
        prompt: plain text, in which no special token is read; may be empty.
        max_new_tokens: at least 1; None: 200, or as many as the model's learned positions allow.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens only; None: among all.
        seed: of the sampling.
        separate_documents: the model was trained so that no document sees the end-of-text token before it.

    Yields:
        Pieces of text, never empty, the prompt not among them.

    Raises:
        TypeError: the prompt is no string.
        ValueError: a value is out of range, or prompt and new tokens together do not fit the model's learned
            positions.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
    if max_new_tokens is not None:
        require_integer("max_new_tokens", max_new_tokens, minimum=1)
    require_integer("seed", seed, minimum=0)
    if top_k is not None:
        require_integer("top_k", top_k, minimum=1)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number >= 0, got {temperature!r}")
    ids = Encoder(tokenizer).encode([prompt])[0].tolist()
    if not (separate_documents and ids):
        ids = [tokenizer.eos_token_id, *ids]
    limit = position_limit(model)
    if max_new_tokens is None:
        max_new_tokens = _NEW_TOKENS if limit is None else max(1, min(_NEW_TOKENS, limit - len(ids)))
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens must be at most {max(0, limit - len(ids))} here, got {max_new_tokens}: the "
            f"model has learned {limit} positions, and the prompt takes {len(ids)} of them"
        )
    tokens = _generate_tokens(model, ids, max_new_tokens, temperature, top_k, seed)
    return _stream(tokens, tokenizer)


@torch.no_grad()
def _generate_tokens(
    model: PreTrainedModel,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    from transformers import DynamicCache

    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    # A short convolution keeps no state: without a cache every token is computed again. `config.use_cache` is
    # no answer, models are saved with false after training with gradient checkpointing.
    has_cache = getattr(model.config, "short_convolution", None) is None
    cache = DynamicCache() if has_cache else None
    inputs = torch.tensor([ids], device=model.device)
    for _ in range(max_new_tokens):
        logits = model(inputs, past_key_values=cache, use_cache=has_cache, logits_to_keep=1).logits[0, -1]
        token = _choose(logits.float(), temperature, top_k, generator)
        yield token
        new = torch.tensor([[token]], device=model.device)
        inputs = new if has_cache else torch.cat([inputs, new], dim=1)


def _choose(
    logits: Float[Tensor, " vocab"], temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if logits.isnan().any():
        raise ValueError("model gives logits that are not numbers: its training has diverged")
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    # From the largest logit, so that a tiny temperature gives no inf - inf.
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _stream(tokens: Iterator[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Decodes as tokens come. The tokens before go along, since some decoders look back."""
    before: list[int] = []
    pending: list[int] = []
    yielded = ""
    for token in tokens:
        if token == tokenizer.eos_token_id:
            break
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

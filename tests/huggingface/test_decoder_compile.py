"""Decoding steps of decoders with layouts under `torch.compile`."""

from typing import Any

import pytest
import torch
from tests.huggingface.decoders import VOCAB, make_decoder
from torch._dynamo.testing import CompileCounterWithBackend

from longshort.huggingface import apply, split_cache

STEPS = 20


def make_model(family, window) -> Any:
    model = make_decoder(family)
    apply(model, num_global_heads=2, window=window, sink_tokens=2)
    return model


@torch.no_grad()
def decode(model, step, prompt, mask, max_length) -> tuple[list[torch.Tensor], int]:
    """Return the tokens of greedy decoding, and how many graphs the step had."""
    cache, length, found = split_cache(model, max_length=max_length), prompt.shape[1], []
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, fullgraph=True, backend=counter) if step is None else step
    logits = model(prompt, attention_mask=mask[:, :length].clone(), past_key_values=cache).logits
    for end in range(length + 1, length + 1 + STEPS):
        found.append(logits[:, -1:].argmax(-1))
        seen = mask[:, :end].clone()  # as `generate` makes it, and not a view
        logits = step(
            found[-1], attention_mask=seen, position_ids=seen.sum(-1)[:, None] - 1, past_key_values=cache
        ).logits
    return found, counter.frame_count


@pytest.mark.parametrize(
    ("family", "length", "window", "max_length"),
    [
        ("llama", 8, 12, 40),  # the ring turns, and loses its first sink, on the way
        pytest.param("llama", 20, 5, 40, marks=pytest.mark.slow),
        pytest.param("llama", 90, 12, None, marks=pytest.mark.slow),  # memory for a quarter more tokens
        pytest.param("gemma3", 20, 5, 40, marks=pytest.mark.slow),
    ],
)
def test_a_padded_step_is_one_graph_for_every_length(family, length, window, max_length):
    torch.compiler.reset()
    model = make_model(family, window)
    prompt = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, length + STEPS, dtype=torch.int64)
    mask[0, :6] = 0
    found, graphs = decode(model, None, prompt, mask, max_length)
    assert graphs <= 2
    assert all(map(torch.equal, found, decode(model, model, prompt, mask, max_length)[0]))

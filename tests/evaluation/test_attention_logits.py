"""Attention logits on a text: windows, progress, and what is refused."""

import pytest
import torch
from tests.huggingface.watched_decoders import make_llama, tokens

from longshort.evaluation import measure_logits
from longshort.huggingface import LogitMonitor


@pytest.mark.parametrize("first_token", [None, 1])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_follow_each_other(first_token: int | None, batch_size: int) -> None:
    model, text, done = make_llama(), tokens(1, 33)[0], []
    reading, names = measure_logits(
        model, text, context_length=9, first_token=first_token, batch_size=batch_size,
        progress=lambda now, total: done.append((now, total)),
    )  # fmt: skip
    assert model.training
    assert names == ["layers.0.self_attn", "layers.1.self_attn"]
    assert done[-1] == (33, 33) and done == sorted(done)
    width = 9 if first_token is None else 8
    with torch.no_grad(), LogitMonitor(model) as monitor:
        for window in text.split(width):
            first = [] if first_token is None else [first_token]
            model(torch.tensor([[*first, *window.tolist()]]), use_cache=False)
    wanted = monitor.reading()
    for found, expected in zip(reading.max_logit_by_head, wanted.max_logit_by_head, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for found, expected in zip(reading.entropy_by_head, wanted.entropy_by_head, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)  # of rows, however they come in passes


def test_a_text_shorter_than_a_window() -> None:
    reading, _ = measure_logits(make_llama(), tokens(1, 5)[0], context_length=9)
    assert reading.max_logit > 0


def test_bad_input() -> None:
    model, text = make_llama(), tokens(1, 5)[0]
    with pytest.raises(ValueError, match="context_length must be an integer >= 1, got 0"):
        measure_logits(model, text, context_length=0)
    with pytest.raises(ValueError, match="context_length must be an integer >= 2, got 1"):
        measure_logits(model, text, context_length=1, first_token=1)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        measure_logits(model, text, context_length=4, batch_size=0)
    with pytest.raises(ValueError, match=r"tokens must be at least one .*, got shape \(0,\)"):
        measure_logits(model, text[:0], context_length=4)

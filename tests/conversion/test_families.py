"""Inspection of several families of decoders: each finds heads, skips layers, and comes out as it went in."""

import pytest
import torch
from tests.conversion.models import random_windows
from tests.huggingface.decoders import make_decoder

from longshort.conversion.budget import KeepHeads
from longshort.conversion.gates import measure_slopes
from longshort.conversion.heads import find_heads
from longshort.conversion.inspection import inspect_heads
from longshort.conversion.journal import Journal
from longshort.conversion.losses import LossMeter
from longshort.huggingface import apply

WINDOWS = random_windows(2, 40)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3", "olmo2", "gpt_oss"]
)
def test_slopes_and_losses(family):
    changes = {"sliding_window": None} if family == "phi3" else {}  # it would slide in every layer
    model = make_decoder(family, vocab_size=256, **changes)
    with torch.no_grad():
        before = model(WINDOWS).logits
    heads = find_heads(model)
    everything = frozenset(heads.candidates)
    apply(model, heads.layouts(everything, 4, 0))
    slopes = measure_slopes(model, heads, dict.fromkeys(everything, 0.5), WINDOWS, 4, 1)
    assert slopes.keys() == everything
    assert all(0 < abs(slope) < 10 for slope in slopes.values())

    meter, plain = (LossMeter(model, heads, WINDOWS, 4, 1) for _ in range(2))
    meter.measure_base(everything)
    kept = everything - {heads.candidates[-1]}
    assert meter.measure(kept) == plain.measure(kept)
    assert meter._base == everything  # layers were skipped
    with torch.no_grad():
        assert torch.allclose(model(WINDOWS).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_what_is_proposed_leaves_sliding_layers_alone(family, tmp_path):
    model = make_decoder(family, vocab_size=256)
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        found = inspect_heads(model, [WINDOWS] * 3, KeepHeads(0.5), window=4, sink_tokens=1, journal=journal)
    assert len(found.heads.candidates) == 3
    stored = apply(model, found.layouts)
    assert stored[0] is not None and stored[0].windows == (11,) * 6

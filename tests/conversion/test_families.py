"""Inspection of several families of decoders: each finds heads, skips layers, and comes out as it went in."""

import pytest
import torch
from tests.conversion.models import random_windows
from transformers import AutoConfig, AutoModelForCausalLM

from longshort.conversion.budget import KeepHeads
from longshort.conversion.gates import measure_slopes
from longshort.conversion.heads import find_heads
from longshort.conversion.inspection import inspect_heads
from longshort.conversion.journal import Journal
from longshort.conversion.losses import LossMeter
from longshort.huggingface import apply

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 12},
    "gemma3_text": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 12},
}
WINDOWS = random_windows(2, 40)


def family(name: str):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "eos_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(name, **{**settings, **FAMILIES[name]})
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_slopes_and_losses(name):
    model = family(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
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


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_what_is_proposed_leaves_sliding_layers_alone(name, tmp_path):
    model = family(name)
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        found = inspect_heads(model, [WINDOWS] * 3, KeepHeads(0.5), window=4, sink_tokens=1, journal=journal)
    assert len(found.heads.candidates) == 4
    stored = apply(model, found.layouts)
    sliding = [layout.windows for layout in stored[::2] if layout is not None]
    assert sliding == [(12,) * 4] * 2

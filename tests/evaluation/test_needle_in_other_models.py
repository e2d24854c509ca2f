"""The needle test on models of transformers, with their limits, first tokens and signatures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.conversion.models import random_llama, save_llama
from tests.evaluation.test_needle import TEXT, Copier
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from longshort.cli import main
from longshort.data import byte_tokenizer
from longshort.evaluation import measure_needle
from longshort.evaluation.positions import longest_input, position_limit
from longshort.huggingface import apply
from longshort.model import LongShortForCausalLM, preset

TOKENS = np.frombuffer((TEXT * 60).encode(), dtype=np.uint8)
SETTINGS = {"lengths": [128], "depths": [0.0, 1.0], "samples": 2}


def small(kind, config, **changes):
    torch.manual_seed(0)
    return kind(config(vocab_size=257, bos_token_id=256, eos_token_id=256, **changes)).eval()


def gpt2():
    return small(GPT2LMHeadModel, GPT2Config, n_positions=100, n_embd=16, n_layer=1, n_head=2)


def opt():
    return small(
        OPTForCausalLM, OPTConfig, max_position_embeddings=100, hidden_size=16, word_embed_proj_dim=16,
        num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, pad_token_id=256,
    )  # fmt: skip


def ours(**changes):
    return LongShortForCausalLM(
        preset("tiny", vocab_size=257, num_hidden_layers=1, hidden_size=32, **changes)
    )


@pytest.mark.parametrize("make", [gpt2, opt])
def test_a_table_of_positions_is_a_limit(make):
    model = make()
    assert position_limit(model) == longest_input(model) == 100
    with pytest.raises(ValueError, match="lengths must be at most 100, the model's learned positions"):
        measure_needle(model, byte_tokenizer(), TOKENS, **SETTINGS)
    assert measure_needle(model, byte_tokenizer(), TOKENS, **{**SETTINGS, "lengths": [100]}).cells


def test_rotary_positions_are_no_limit():
    model = random_llama(max_position_embeddings=64)
    assert (position_limit(model), longest_input(model)) == (None, 64)
    assert position_limit(ours(position_embedding="rope")) is None
    assert position_limit(ours(position_embedding="learned", max_position_embeddings=77)) == 77


def test_a_table_as_large_as_the_context_by_chance_is_no_limit_of_tokens():
    model = random_llama(vocab_size=512, max_position_embeddings=512)
    assert position_limit(model) is None


def test_layouts_change_only_what_is_distant():
    model = random_llama()
    tokenizer = byte_tokenizer()
    before = measure_needle(model, tokenizer, TOKENS, **SETTINGS).cells
    apply(model, num_global_heads=0, window=200)
    assert [
        cell.gain for cell in measure_needle(model, tokenizer, TOKENS, **SETTINGS).cells
    ] == pytest.approx([cell.gain for cell in before], abs=1e-4)
    apply(model, num_global_heads=0, window=4)
    far = measure_needle(model, tokenizer, TOKENS, **SETTINGS).cells[0]
    assert far.gain == pytest.approx(0, abs=1e-5)
    assert abs(before[0].gain) > 1e-3


def test_windows_begin_with_the_token_that_texts_begin_with():
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    model = Copier(reach=300)
    cells = measure_needle(model, tokenizer, TOKENS, **SETTINGS).cells
    assert all(cell.accuracy == 1.0 for cell in cells)
    for windows in model.calls:
        assert windows.shape[1] == 128
        assert bool((windows[:, 0] == 256).all())
        assert bool((windows[:, 1:] != 256).all())


class WholeCopier(Copier):
    """A copier that always gives all logits."""

    def forward(self, input_ids, use_cache):
        logits = super().forward(input_ids, use_cache, logits_to_keep=input_ids.shape[1] - self.match).logits
        return SimpleNamespace(logits=logits)


def test_a_model_may_give_all_logits():
    model, truth = WholeCopier(reach=300), Copier(reach=300)
    assert measure_needle(model, byte_tokenizer(), TOKENS, **SETTINGS) == measure_needle(
        truth, byte_tokenizer(), TOKENS, **SETTINGS
    )


@pytest.mark.parametrize("text", [TOKENS[None], TOKENS.astype(float), TOKENS.tolist(), None])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="token_file must be a TokenFile or token ids"):
        measure_needle(random_llama(), byte_tokenizer(), text, **SETTINGS)


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="token_file has a vocabulary of 301, but the model one of 257"):
        measure_needle(random_llama(), byte_tokenizer(), np.array([300] * 200), **SETTINGS)


def test_the_command(tmp_path, capsys, fails):
    model, text, numbers = save_llama(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "needle.json"
    text.write_text(TEXT * 60)
    arguments = [
        "needle", str(model), "--text", str(text), "--lengths", "96", "128", "--depths", "0", "1",
        "--samples", "2", "--json", str(numbers),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "found" in capsys.readouterr().out
    cells = json.loads(numbers.read_text())["cells"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(96, 0), (96, 1), (128, 0), (128, 1)]
    assert "exists already" in fails(1, *arguments)
    assert "--depths must be" in fails(2, "needle", "model", "--depths", "2")

"""Uploads to a stand-in of the Hugging Face Hub, and what is loaded from there in another process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.huggingface.hub import serve_hub

_SETUP = """
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longshort.data import byte_tokenizer
from longshort.huggingface import apply, layouts_of, push_to_hub, remove
from longshort.model import LongShortConfig, LongShortForCausalLM

ids = torch.arange(40)[None]
torch.manual_seed(0)
SIZES = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)

def own():
    return LongShortForCausalLM(LongShortConfig(**SIZES, local_window=5, max_position_embeddings=64)).eval()

def changed():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    apply(model, num_global_heads=1, window=5, sink_tokens=2)
    return model

def require_equal(model, other):
    assert type(model) is type(other)
    state, loaded = model.state_dict(), other.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    assert torch.equal(model(ids).logits, other(ids).logits)
"""


def run(program: str, folder: Path, url: str) -> str:
    """Run a program that knows no Hub but the stand-in; return what it printed."""
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_of_nobody",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", _SETUP + program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def card_of(content: bytes) -> Any:
    return ModelCard(content.decode())


def test_a_model_comes_back_from_the_hub_bit_for_bit(tmp_path: Path) -> None:
    program = """
model = own()
model.push_to_hub('user/first', tokenizer=byte_tokenizer())
loaded = AutoModelForCausalLM.from_pretrained('user/first')
require_equal(model, loaded)
assert AutoTokenizer.from_pretrained('user/first')('ab')['input_ids'] == [97, 98]

loaded.save_pretrained('folder', push_to_hub=True, repo_id='user/second')
require_equal(model, AutoModelForCausalLM.from_pretrained('user/second'))
loaded.push_to_hub('user/first', tags=['more'])
HfApi().upload_file(path_or_fileobj=b'Mine.', path_in_repo='README.md', repo_id='user/second')
model.push_to_hub('user/second')
model.push_to_hub('user/second', revision='dev', commit_message='Try it')
"""
    with serve_hub() as hub:
        said = run(program, tmp_path, hub.url)
        assert hub.unknown == []
        names = ["first", "second", "first", "second", "second", "second@dev"]
        assert hub.commits == [f"user/{name}" for name in names]
        assert hub.repositories["user/second@dev"]["README.md"] == b"Mine."
        first, second = (hub.repositories[f"user/{name}"] for name in ("first", "second"))
    card = card_of(first["README.md"])
    assert card.data.library_name == "longshort" and card.data.base_model is None
    assert card.data.tags == ["longshort", "ls-attention", "more"]
    assert 'name = "user/first"' in card.text
    assert second["README.md"] == b"Mine."  # since a user wrote it
    assert "README.md of user/second stays as it is" in said
    saved = card_of((tmp_path / "folder" / "README.md").read_bytes())
    assert saved.data.base_model == "user/first"


@pytest.mark.slow
def test_a_decoder_with_layouts_comes_back_from_the_hub_bit_for_bit(tmp_path: Path) -> None:
    program = """
model = changed()
push_to_hub(model, 'user/name', tokenizer=byte_tokenizer())
loaded = AutoModelForCausalLM.from_pretrained('user/name')
require_equal(model, loaded)
assert layouts_of(loaded) == layouts_of(model)
assert AutoTokenizer.from_pretrained('user/name')('ab')['input_ids'] == [97, 98]
model.push_to_hub('user/name')  # of transformers, which keeps a card that is there
remove(model)
try:
    push_to_hub(model, 'user/without')
except ValueError as error:
    print(error)
"""
    with serve_hub() as hub:
        said = run(program, tmp_path, hub.url)
        assert hub.unknown == []
        assert hub.commits == ["user/name", "user/name"]
        assert hub.repositories.keys() == {"user/name"}
        card = card_of(hub.repositories["user/name"]["README.md"])
    assert card.data.library_name == "longshort"
    assert "import longshort.huggingface" in card.text and "tokenizer = " in card.text
    assert "model must have layouts, got LlamaForCausalLM without" in said

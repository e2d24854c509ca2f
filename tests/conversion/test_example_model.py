"""The example model, a real one: its weights, and what an inspection finds in it."""

import os
from pathlib import Path

import pytest
import torch

from longshort.conversion.budget import KeepHeads
from longshort.conversion.example_model import write_example_model
from longshort.conversion.inspection import inspect_heads
from longshort.conversion.journal import Journal
from longshort.conversion.measures import continue_greedily, measure_losses, measure_needles
from longshort.conversion.text import cut_parts, read_tokens
from longshort.huggingface import apply
from longshort.huggingface.loading import load_decoder

FOLDER = Path(os.environ.get("EXAMPLE", Path(__file__).parents[2] / ".cache" / "smollm2"))
TEXT = Path(os.__file__).with_name("argparse.py")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_example_model(tmp_path)


@pytest.fixture(scope="module")
def example():
    if not (FOLDER / "config.json").exists():
        pytest.fail(f"there is no model in {FOLDER}: make example-model")
    return load_decoder(FOLDER, dtype=torch.float32)


@pytest.mark.slow
def test_it_knows_a_little(example):
    prompt = torch.tensor(example.tokenizer("The capital of France is").input_ids)
    assert continue_greedily(example, prompt, 3).startswith(" Paris")
    tokens = read_tokens(TEXT, example.tokenizer)
    assert measure_losses(example.model, tokens[None, :512])["loss"] < 3
    (cell,) = measure_needles(example, tokens, [256], [0.5], samples=2)
    assert cell["gain"] > 1


@pytest.mark.slow
def test_an_inspection_beats_a_ranking_by_mass(example, tmp_path):
    tokens = read_tokens(TEXT, example.tokenizer)
    parts = cut_parts(tokens, 192, [1, 1, 4])
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        found = inspect_heads(
            example.model, parts, KeepHeads(0.25), window=16, sink_tokens=4, journal=journal
        )
    rises = {proposal.name: proposal.rises["report"] for proposal in found.proposals}
    assert len(found.best.kept) <= 22
    assert 0 < found.best.rises["report"] < 0.6 * rises["mass"]


@pytest.mark.slow
def test_text_is_the_same_with_and_without_the_split_cache(example):
    model = example.model
    layouts = apply(model, num_global_heads=3, window=32, sink_tokens=4)
    assert len(layouts) == 30
    ids = read_tokens(TEXT, example.tokenizer)[None, :200]
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))

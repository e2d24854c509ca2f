"""EleutherAI's harness on our models: by path, offline, with the answers that the losses imply."""

import json
import random
from typing import Any

import pytest
import torch
from tests.conversion.models import random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import longshort.model  # noqa: F401  (models with layouts and our own load after it)
from longshort.data import byte_tokenizer
from longshort.huggingface import apply, layouts_of
from longshort.model import LongShortForCausalLM, preset

CHOICES = ["yes", "no", "maybe"]


def save_converted(folder):
    model = random_llama()
    apply(model, num_global_heads=[2, 0, 2], window=4, sink_tokens=1)
    model.save_pretrained(folder)


def save_ours(folder):
    torch.manual_seed(0)
    config = preset("tiny", vocab_size=257, num_hidden_layers=2, hidden_size=32, local_window=4)
    LongShortForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the harness are its own
@pytest.mark.parametrize("save", [save_converted, save_ours])
def test_the_harness_scores_a_model_by_its_path(tmp_path, monkeypatch, save):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    save(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    generator = random.Random(0)
    documents = [
        {"text": "".join(generator.choices("abcdef", k=40)), "label": number % 3} for number in range(12)
    ]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    evaluate: Any = simple_evaluate
    results = evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "device": "cpu", "dtype": "float32"},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    if save is save_converted:
        assert layouts_of(model) is not None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    hits = 0
    for document, sample in zip(documents, results["samples"]["tiny"], strict=True):
        scores = [score(model, tokenizer, document["text"], f" {choice}") for choice in CHOICES]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(scores, rel=1e-4)
        hits += scores.index(max(scores)) == document["label"]
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(hits / len(documents))


@torch.no_grad()
def score(model, tokenizer, context: str, continuation: str) -> float:
    """The log-probability of a continuation."""
    before, whole = (tokenizer(text).input_ids for text in (context, context + continuation))
    losses = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(losses[place - 1, whole[place]].item() for place in range(len(before), len(whole)))

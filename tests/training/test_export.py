"""Exported checkpoints: their model cards hold the numbers of the run, and both load in another process."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tests.huggingface.decoders import make_decoder
from tests.training.runs import SettingsFor

from longshort.cli import main
from longshort.data import byte_tokenizer
from longshort.huggingface import apply
from longshort.training.export import export_run
from longshort.training.loop import train
from longshort.training.metrics import METRICS_FILE, read_metrics
from longshort.training.model_card import public_name, run_facts
from longshort.training.run import read_run
from longshort.training.trained import open_trained


@pytest.fixture
def run(settings_for: SettingsFor) -> Path:
    """A run of 12 steps with checkpoints after 5, 10 and 12, and validation after 6 and 12."""
    settings = settings_for()
    train(settings)
    return settings.out


def card_of(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def test_the_card_of_the_last_checkpoint_has_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(run), "--max-tokens", "2000"]) == 0
    export_run(run, tmp_path / "model")
    card, metrics = card_of(tmp_path / "model"), read_metrics(run)
    (evaluation,) = (json.loads(path.read_text()) for path in (run / "evaluation").glob("*.json"))
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("loss", metrics[-1]["validation_loss"]),
        ("perplexity", math.exp(metrics[-1]["validation_loss"])),
        ("loss", evaluation["loss"]),
        ("perplexity", evaluation["perplexity"]),
        ("bits_per_byte", evaluation["bits_per_byte"]),
    ]
    corpus = read_run(run).training.data.parents[1]
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert str(corpus) not in str(card) and card.data.datasets is None
    peak = max((line for line in metrics if "max_logit_by_head" in line), key=lambda line: line["max_logit"])
    assert (
        f"| largest attention logit | {peak['max_logit']:.4f} | training, step {peak['step']} |" in card.text
    )
    assert "| largest attention logit of the local heads |" in card.text
    for row in (
        "optimizer steps | 12 of 12", f"tokens seen | {metrics[-1]['tokens']:,}", "sequences per step | 4",
        "largest learning rate | 0.003, cosine schedule", "precision | fp32, attention: input", "seed | 0",
        f"trained with | longshort {read_run(run).versions['longshort']}, torch {torch.__version__}",
    ):  # fmt: skip
        assert f"| {row} |" in card.text, row
    assert "tokenizer = AutoTokenizer" in card.text and "path/to/model" in card.text
    assert not list(run.rglob("README.md"))  # checkpoints are as they were


def test_the_card_of_an_earlier_checkpoint_has_nothing_of_later_steps(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "model", step=10)
    card, metrics = card_of(tmp_path / "model"), read_metrics(run)
    assert card.data.eval_results is None  # nothing was measured with these weights
    (measured,) = (line["validation_loss"] for line in metrics if line["step"] == 6)
    assert f"| validation loss (nats per token) | {measured:.4f} | step 6 |" in card.text
    export_run(run, tmp_path / "first", step=5)
    assert "validation loss" not in card_of(tmp_path / "first").text


def test_what_is_not_known_is_left_out(run: Path) -> None:
    config = read_run(run)
    (run / METRICS_FILE).unlink()
    facts = run_facts(run, config, 12)
    assert facts.measurements == []
    moved = config.training.data.with_name("moved")
    config.training.data.rename(moved)
    try:
        assert dict(run_facts(run, config, 12).training)["text"] == "data folder data"
    finally:
        moved.rename(config.training.data)


def test_values_that_were_not_finite_are_named(run: Path) -> None:
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    for line in lines[5:]:
        line["max_logit"] = line["validation_loss"] = None
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = run_facts(run, read_run(run), 12)
    remarks = {name: value for name, value in facts.training if "not finite" in name}
    assert remarks == {
        "first step whose max logit was not finite": "6",
        "first step whose validation loss was not finite": "6",
    }
    assert not any(entry.metric for entry in facts.measurements)


def test_a_damaged_evaluation_is_refused(run: Path) -> None:
    (run / "evaluation").mkdir()
    (run / "evaluation" / "step-12-context-48.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-12-context-48\.json is not the result of an evaluation"):
        run_facts(run, read_run(run), 12)


def test_names_of_sources_have_no_folders_of_this_machine() -> None:
    assert public_name("hf:user/text:en") == "hf:user/text:en"
    assert public_name("notes/texts") == "notes/texts"
    assert public_name(str(Path.home() / "secret" / "texts")) == "texts"


def test_overwriting_keeps_a_card_that_was_changed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    export_run(run, out, step=5)
    assert main(["export", str(run), str(out), "--step", "10", "--overwrite"]) == 0
    assert "10 of 12" in (out / "README.md").read_text()
    (out / "README.md").write_text("Mine.")
    capsys.readouterr()
    assert main(["export", str(run), str(out), "--overwrite"]) == 0
    assert "its README.md was changed, and is kept" in " ".join(capsys.readouterr().out.split())
    assert (out / "README.md").read_text() == "Mine."


def test_overwriting_keeps_a_folder_with_files_of_the_user(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export_run(run, out, step=5)
    weights = (out / "model.safetensors").read_bytes()
    (out / ".git").mkdir()
    (out / "notes.md").write_text("Mine.")
    with pytest.raises(FileExistsError, match=r"model stays as it is: .* lost, \.git, notes\.md"):
        export_run(run, out, overwrite=True)
    assert (out / "notes.md").read_text() == "Mine." and (out / ".git").is_dir()
    assert (out / "model.safetensors").read_bytes() == weights


_ELSEWHERE = """
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folders = {"longshort.model": sys.argv[1], "longshort.huggingface": sys.argv[2]}
for folder in folders.values():
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
for module, folder in reversed(folders.items()):
    __import__(module)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    torch.save(model(**tokenizer("a text", return_tensors="pt")).logits, folder + "/logits.pt")
"""


def test_models_load_elsewhere_by_an_import_alone(run: Path, tmp_path: Path) -> None:
    own, changed = tmp_path / "own", tmp_path / "changed"
    export_run(run, own)
    model = make_decoder("llama", vocab_size=257)
    apply(model, num_global_heads=2, window=4)
    model.save_pretrained(changed)
    byte_tokenizer().save_pretrained(changed)
    command = [sys.executable, "-c", _ELSEWHERE, str(own), str(changed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without_own, without_changed = done.stdout.splitlines()
    assert without_own.startswith("ValueError") and "model type `longshort`" in without_own
    assert "import longshort.huggingface" in without_changed
    ids = byte_tokenizer()("a text", return_tensors="pt")["input_ids"]
    for folder, expected in ((own, open_trained(run).model), (changed, model)):
        assert torch.equal(torch.load(folder / "logits.pt"), expected(ids).logits)

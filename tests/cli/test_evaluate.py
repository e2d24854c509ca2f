import json
import math
import shutil
from typing import get_args

import pytest
import torch

from longshort.cli import main
from longshort.data import DataFolder, DocumentStart
from longshort.evaluation import evaluate_documents
from longshort.training.trained import open_trained


def test_table_json_and_plot(run, data, capsys):
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    trained = open_trained(run)
    expected = evaluate_documents(trained.model, DataFolder.open(data).validation, context_length=32)
    content = json.loads((run / "evaluation" / "step-12-context-32.json").read_text())
    assert content["step"] == 12
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert content[name] == pytest.approx(getattr(expected, name), rel=1e-6)
    assert content["tokens"] == len(DataFolder.open(data).validation)
    assert sum(position["tokens"] for position in content["loss_by_position"]) == content["tokens"]
    assert f"{expected.loss:.4f}" in shown
    assert f"{expected.bits_per_byte:.4f}" in shown
    assert (run / "evaluation" / "step-12-context-32.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("token_order", ["text", "permuted"])
def test_a_run_of_another_token_order_is_measured_on_text_and_says_so(run, capsys, token_order):
    config = json.loads((run / "config.json").read_text())
    config["training"]["token_order"] = token_order
    (run / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(run)]) == 0
    note = "trained with --token-order permuted, but measured here on plain text"
    assert (note in capsys.readouterr().out.splitlines()) == (token_order == "permuted")
    content = json.loads((run / "evaluation" / "step-12-context-32.json").read_text())
    assert content["note"] == (note if token_order == "permuted" else None)


@pytest.mark.parametrize("document_start", ["at-end-of-text", "after-end-of-text", None])
def test_documents_begin_where_those_of_the_training_did(run, data, document_start):
    config = json.loads((run / "config.json").read_text())
    config["training"]["separate_documents"] = True
    config["document_start"] = document_start
    if document_start is None:  # as earlier versions wrote it
        del config["document_start"]
    (run / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(run)]) == 0
    content = json.loads((run / "evaluation" / "step-12-context-32.json").read_text())
    model, validation = open_trained(run).model, DataFolder.open(data).validation
    losses = [
        evaluate_documents(
            model, validation, context_length=32, separate_documents=True, document_start=start
        ).loss
        for start in get_args(DocumentStart)
    ]
    assert content["loss"] == losses[document_start != "at-end-of-text"]
    assert losses[0] != losses[1]


def test_settings_arrive(run, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "moved")
    numbers, plot = tmp_path / "numbers.json", tmp_path / "plot.png"
    flags = [
        "--data",
        str(other),
        "--context",
        "8",
        "--max-tokens",
        "600",
        "--batch-size",
        "3",
        "--device",
        "cpu",
    ]
    assert (
        main(["evaluate", str(run), *flags, "--threads", "1", "--json", str(numbers), "--plot", str(plot)])
        == 0
    )
    content = json.loads(numbers.read_text())
    assert content["context_length"] == 8
    assert content["tokens"] <= 600
    assert content["data"] == str(other)
    assert plot.is_file()
    assert not (run / "evaluation").exists()
    assert f"{content['documents']} of " in capsys.readouterr().out


def test_different_measurements_get_different_files(run, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "moved")
    for flags in ([], ["--context", "16"], ["--max-tokens", "500"], ["--data", str(other)]):
        assert main(["evaluate", str(run), *flags]) == 0
    assert len(list((run / "evaluation").glob("*.json"))) == 4


def test_the_newest_checkpoint_is_measured(run):
    (run / "checkpoints" / "step-12").rename(run / "checkpoints" / "step-9")
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run / "evaluation" / "step-9-context-32.json").read_text())["step"] == 9


def test_a_diverged_model_gives_null(run):
    trained = open_trained(run)
    with torch.no_grad():
        trained.model.lm_head.weight.fill_(math.nan)
    trained.model.save_pretrained(run / "checkpoints" / "step-12")
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run / "evaluation" / "step-12-context-32.json").read_text())["loss"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "0"], "--context"),
        (["--context", "many"], "many"),
        (["--max-tokens", "-3"], "--max-tokens"),
        (["--batch-size", "0"], "--batch-size"),
        (["--threads", "0"], "--threads"),
        (["--device", "abacus"], "--device"),
    ],
    ids=str,
)
def test_wrong_usage(fails, trained, flags, message):
    assert message in fails(2, "evaluate", trained, *flags)
    assert not (trained / "evaluation").exists()


def test_a_run_is_needed(fails):
    fails(2, "evaluate")


def test_files_of_the_user_are_kept(fails, run, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for flag in ("--json", "--plot"):
        assert "exists already" in fails(1, "evaluate", run, flag, mine)
    assert mine.read_text() == "precious"
    assert not (run / "evaluation").exists()


def test_what_is_no_run_is_a_failure(fails, tmp_path):
    assert "not the folder of a run" in fails(1, "evaluate", tmp_path)


def test_a_run_without_checkpoint_is_a_failure(fails, run):
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint yet" in fails(1, "evaluate", run)


def test_damaged_weights_are_a_failure(fails, run):
    weights = run / "checkpoints" / "step-12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in fails(1, "evaluate", run)


def test_a_context_beyond_the_positions_is_a_failure(fails, run):
    assert "at most 32, the model's learned positions, got 64" in fails(1, "evaluate", run, "--context", "64")


def test_data_of_another_tokenizer_are_a_failure(fails, run, corpus, tmp_path):
    other = tmp_path / "bpe"
    assert main(["data", str(corpus), "--out", str(other), "--tokenizer", "bpe", "--vocab-size", "258"]) == 0
    assert "another tokenizer" in fails(1, "evaluate", run, "--data", other)


def test_missing_data_are_a_failure(fails, run, tmp_path):
    assert "no data folder" in fails(1, "evaluate", run, "--data", tmp_path / "nowhere")

"""`longshort watch`: numbers, table and picture of a model's logits on a text."""

import json
from pathlib import Path

import pytest
import torch
from tests.huggingface.watched_decoders import VOCABULARY, make_decoder, make_llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from longshort.cli import main
from longshort.huggingface import LogitMonitor

TEXT = "the quick brown fox jumps over the lazy dog " * 6


def save_tokenizer(folder: Path) -> None:
    """One token per character; a beginning-of-text token first."""
    letters = {chr(97 + index): 3 + index for index in range(26)}
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "</s>": 2, **letters, " ": 40}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_table_numbers_and_picture(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    flags = ["--context", "21", "--batch-size", "2", "--max-tokens", "50", "--attention", "eager"]
    assert main(["watch", str(llama), "--text", str(text), "--out", str(out), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads((out / "logits.json").read_text())

    ids = torch.tensor([40 if letter == " " else ord(letter) - 94 for letter in TEXT[:50]])
    model = make_llama().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad(), LogitMonitor(model) as monitor:
        for windows in (ids[:40].view(2, 20), ids[None, 40:]):  # a first token before each
            model(torch.cat([torch.ones_like(windows[:, :1]), windows], dim=1), use_cache=False)
    wanted = monitor.reading().as_metrics()
    assert {name: found[name] for name in wanted} == wanted
    assert (found["tokens"], found["context"]) == (50, 21)
    assert found["layers"] == ["layers.0.self_attn", "layers.1.self_attn"]

    assert "LlamaForCausalLM with eager attention on 50 of 264 tokens, in windows of 21" in captured.out
    rows = [line.split() for line in captured.out.splitlines() if line.split()[:1] in (["0"], ["1"])]
    for layer, row in enumerate(rows):
        heads = wanted["max_logit_by_head"][layer]
        assert float(row[1]) == pytest.approx(max(heads), rel=0.01)
        assert int(row[2]) == heads.index(max(heads))
        assert [float(cell) for cell in row[6:]] == pytest.approx(heads, rel=0.01)
    assert f"largest logit: {wanted['max_logit']:.4g}, head " in captured.out
    assert (out / "logits.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_folder_nothing_is_written(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["watch", str(llama), "--text", str(text), "--max-tokens", "9", "--dtype", "bfloat16"]) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_many_heads_has_a_narrow_table(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_decoder("llama", hidden_size=40, num_attention_heads=20).save_pretrained(tmp_path / "wide")
    save_tokenizer(tmp_path / "wide")
    assert main(["watch", str(tmp_path / "wide"), "--text", str(text), "--max-tokens", "20"]) == 0
    shown = capsys.readouterr().out
    assert " h0 " not in shown
    assert max(len(line) for line in shown.splitlines() if line.startswith(" ")) < 80


def test_nothing_is_overwritten(fails, llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "logits.png").write_text("precious")
    assert "logits.png exists already" in fails(1, "watch", llama, "--text", text, "--out", tmp_path)
    assert (tmp_path / "logits.png").read_text() == "precious"
    assert not (tmp_path / "logits.json").exists()


def test_failures_are_reported_in_one_line(fails, llama: Path, text: Path, tmp_path: Path) -> None:
    assert "nowhere: No such file" in fails(1, "watch", llama, "--text", tmp_path / "nowhere")
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "must hold text, got an empty file" in fails(1, "watch", llama, "--text", empty)
    assert "must be UTF-8" in fails(1, "watch", llama, "--text", binary)
    message = fails(1, "watch", llama, "--text", text, "--context", "65")
    assert "--context must be at most 64, the model's positions, got 65" in message
    message = fails(1, "watch", llama, "--text", text, "--attention", "astral")
    assert "cannot be loaded as a causal language model" in message and "astral" in message
    assert "cannot be loaded as a causal language model" in fails(1, "watch", tmp_path, "--text", text)
    make_llama().save_pretrained(tmp_path)
    assert "must have a tokenizer beside its model" in fails(1, "watch", tmp_path, "--text", text)
    (tmp_path / "model.safetensors").unlink()
    assert "must hold a model: " in fails(1, "watch", tmp_path, "--text", text)


def test_a_model_that_cannot_be_watched_is_refused(fails, text: Path, tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    save_tokenizer(tmp_path / "falcon")
    message = fails(1, "watch", tmp_path / "falcon", "--text", text, "--out", tmp_path / "out")
    assert "model must be one that can be watched" in message and "was not observed" in message
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_nowhere(fails, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(name: str, **_: object) -> None:
        raise OSError(f"We couldn't connect to the Hub for {name}.\nMore lines.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    message = fails(1, "watch", "some/model", "--text", text)
    assert "there is no folder some/model, and the Hugging Face Hub gave no model of that name" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "1"], "--context"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--batch-size", "0"], "--batch-size"),
        (["--dtype", "fp8"], "--dtype"),
        (["--device", "abacus"], "--device"),
    ],
    ids=str,
)
def test_wrong_usage(fails, llama: Path, text: Path, flags: list[str], message: str) -> None:
    assert message in fails(2, "watch", llama, "--text", text, *flags)
    assert "--text" in fails(2, "watch", llama)

"""Conversion: the folder loads as a model of transformers, and its report says what one can measure."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tests.conversion.conftest import CONVERT, WINDOW
from tests.conversion.models import random_llama, save_short_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from longshort.conversion import converting
from longshort.conversion.converting import ReportSizes, fit_sizes, measure_conversion
from longshort.conversion.heads import find_heads
from longshort.conversion.journal import Journal
from longshort.conversion.layout_file import read_layouts, write_layouts
from longshort.conversion.models import save_into
from longshort.conversion.text import read_tokens
from longshort.data import byte_tokenizer
from longshort.huggingface import SplitCache, layouts_of, remove
from longshort.huggingface.loading import Pretrained, load_decoder
from longshort.layout import HeadLayout


def load(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_folder_holds_the_original_with_layouts(original, converted, layout):
    model, before = load(converted), load(original)
    assert layouts_of(model) == read_layouts(layout) == read_layouts(converted / "layout.json")
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in before.state_dict().items())
    ids = AutoTokenizer.from_pretrained(converted)("some text").input_ids
    assert ids == list(b"some text")


def test_the_losses_of_the_report_can_be_repeated(original, converted):
    content = json.loads((converted / "conversion.json").read_text())
    windows = load_file(converted / "held_out.safetensors")
    models = {"before": load(original), "after": load(converted)}
    assert list(content["losses"]) == ["32", "64"]  # the text has no 9,999 tokens
    for length, losses in content["losses"].items():
        ids = windows[f"windows-{length}"]
        assert ids.shape[1] == int(length)
        for state, model in models.items():
            with torch.no_grad():
                loss = model(ids, labels=ids).loss.item()
            assert losses[state]["loss"] == pytest.approx(loss, abs=1e-4)
            bins = losses[state]["by_position"]
            assert [bins[0]["first"], bins[-1]["last"]] == [1, int(length) - 1]
            mean = sum(bin_["loss"] * (bin_["last"] - bin_["first"] + 1) for bin_ in bins) / (int(length) - 1)
            assert mean == pytest.approx(loss, abs=1e-4)
        assert losses["before"]["by_position"][0] == pytest.approx(losses["after"]["by_position"][0])
    assert content["losses"]["64"]["after"]["loss"] != content["losses"]["64"]["before"]["loss"]


def test_the_cache_of_the_report_is_the_cache(converted):
    content = json.loads((converted / "conversion.json").read_text())
    model = load(converted)
    ids = torch.zeros(1, 512, dtype=torch.long)
    with torch.no_grad():
        cache = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        assert content["cache"]["512"]["before"] == sum(
            x.nbytes for y in cache.layers for x in (y.keys, y.values)
        )
    kept = 512 + 5 * (WINDOW + 2)
    assert content["cache"]["512"]["after"] == 2 * kept * 8 * 4
    assert (
        content["latency"]["200"]["after"]["cache_bytes"] < content["latency"]["200"]["before"]["cache_bytes"]
    )


def test_greedy_text_is_the_same_with_and_without_cache(converted):
    model = load(converted)
    ids = load_file(converted / "held_out.safetensors")["prompts"][:1]
    with_cache = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    without = model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False)
    assert isinstance(with_cache.past_key_values, SplitCache)
    assert torch.equal(with_cache.sequences, without)
    sample = json.loads((converted / "conversion.json").read_text())["samples"][0]
    assert sample["after"].startswith(
        AutoTokenizer.from_pretrained(converted).decode(without[0, ids.shape[1] :])
    )


@pytest.mark.slow
def test_a_new_process_loads_it_with_one_import_and_not_without(converted):
    code = """
import sys, torch
{}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(float(model(torch.arange(40)[None]).logits.double().sum()))
"""
    results = [
        subprocess.run(
            [sys.executable, "-c", code.format(line), str(converted)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        for line in ("import longshort.huggingface", "")
    ]
    assert results[0].returncode == 0, results[0].stderr
    with torch.no_grad():
        truth = load(converted)(torch.arange(40)[None]).logits.double().sum().item()
    assert float(results[0].stdout.split()[-1]) == pytest.approx(truth, rel=1e-6)
    assert results[1].returncode != 0
    assert "longshort" in results[1].stderr


def test_the_page_shows_everything(converted):
    page = (converted / "report.html").read_text()
    for heading in ("Loss", "Cache and latency", "Needles", "Samples"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data:image/png") == 3


def convert(*arguments):
    from longshort.cli import main

    return main(["convert", *map(str, arguments)])


def test_an_interrupted_conversion_resumes(
    original, layout, text, converted_once, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    arguments = (original, out, "--layout", layout, "--text", text, *CONVERT)

    interrupt(monkeypatch, "measure_needles")
    assert convert(*arguments) == 130
    assert (out / "journal.jsonl").exists()
    assert not (out / "conversion.json").exists()
    monkeypatch.undo()
    measured = []
    measure = converting.measure_losses
    monkeypatch.setattr(converting, "measure_losses", lambda *args: measured.append(1) or measure(*args))
    assert convert(*arguments) == 0
    assert len(measured) == 2  # after; those before were known
    losses, truth = (
        json.loads((folder / "conversion.json").read_text())["losses"] for folder in (out, converted_once)
    )
    assert losses == truth


def layouts_in(folder):
    return json.loads((folder / "config.json").read_text())["longshort"]["layouts"]


def test_a_conversion_without_report_is_complete(original, layout, text, tmp_path, fails):
    out = tmp_path / "out"
    arguments = (original, out, "--layout", layout, "--text", text, "--no-report")
    assert convert(*arguments) == 0
    held = layouts_in(out)
    other = write_other_layout(tmp_path)
    for options in (("--no-report",), ()):
        message = fails(1, "convert", original, out, "--layout", other, "--text", text, *options)
        assert "exists already and is not empty" in message
    assert layouts_in(out) == held
    assert read_layouts(out / "layout.json") == read_layouts(layout)


def test_other_layouts_do_not_go_on(original, layout, text, tmp_path, monkeypatch, fails):
    out = tmp_path / "out"
    interrupt(monkeypatch, "measure_needles")
    arguments = ("--text", text, *CONVERT)
    assert convert(original, out, "--layout", layout, *arguments) == 130
    monkeypatch.undo()
    held = layouts_in(out)
    other = write_other_layout(tmp_path)
    message = fails(1, "convert", original, out, "--layout", other, *arguments)
    assert "holds a model with other layouts" in message
    model = tmp_path / "model"
    random_llama(rms_norm_eps=1e-3).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    message = fails(1, "convert", model, out, "--layout", layout, *arguments)
    assert "holds measurements with another model" in message
    assert layouts_in(out) == held


def test_other_sizes_go_on(original, layout, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(monkeypatch, "continue_greedily")
    arguments = (original, out, "--layout", layout, "--text", text, "--latency-lengths", 200)
    assert convert(*arguments, "--lengths", 32, 64, "--needle-lengths", 128) == 130
    monkeypatch.undo()
    measured = []
    measure = converting.measure_losses
    monkeypatch.setattr(
        converting, "measure_losses", lambda *args: measured.append(args[1].shape[1]) or measure(*args)
    )
    assert convert(*arguments, "--lengths", 64, 96, "--needle-lengths", 100) == 0
    assert measured == [96, 64, 96]  # 64 before was known
    content = json.loads((out / "conversion.json").read_text())
    assert list(content["losses"]) == ["64", "96"]
    assert {cell["length"] for cell in content["needles"]["after"]} == {100}


def test_what_a_measurement_depends_on_is_measured_again(original, text, tmp_path):
    """Another layout, and other windows of the same length, are not taken for those of before."""
    pretrained = load_decoder(original, dtype=torch.float32)
    tokens = read_tokens(text, pretrained.tokenizer)
    heads = find_heads(pretrained.model)
    sizes = ReportSizes(
        lengths=(64,), tokens=128, latency_lengths=(), needle_lengths=(), prompt_tokens=16, sample_tokens=2
    )
    found = []
    for kept, tokens_of in ((0, 128), (1, 128), (1, 256)):
        layouts = heads.layouts(heads.candidates[:kept], WINDOW, 0)
        wanted = replace(sizes, tokens=tokens_of)
        with Journal(tmp_path / "journal.jsonl", {}) as journal:
            conversion = measure_conversion(pretrained, layouts, tokens, wanted, journal, tmp_path)
        remove(pretrained.model)
        found.append(conversion.losses[64])
    assert found[0]["before"] == found[1]["before"]
    assert found[0]["after"]["loss"] != found[1]["after"]["loss"]
    assert found[2]["before"]["tokens"] == 4 * 63


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--lengths", 0), 2, "--lengths must be an integer >= 2, got 0"),
        (("--lengths", 64, 1), 2, "--lengths must be an integer >= 2, got 1"),
        (("--latency-lengths", 0), 2, "--latency-lengths must be an integer >= 1, got 0"),
        (("--needle-lengths", 10), 1, "--needle-lengths"),
        (("--length", 9999), 1, "text must have at least"),
        (("--length", 16, "--window", 12), 2, "--length must be more than"),
    ],
    ids=str,
)
def test_bad_sizes_are_refused_before_anything_is_written(
    original, text, tmp_path, fails, options, code, message
):
    out = tmp_path / "out"
    assert message in fails(code, "convert", original, out, "--text", text, *options)
    assert not out.exists()


def test_a_report_fits_a_model_of_few_positions_and_a_short_text(text, tmp_path):
    model, out, short = tmp_path / "model", tmp_path / "out", tmp_path / "short.txt"
    save_short_gpt2(model)
    short.write_text(text.read_text()[:500])
    layout = tmp_path / "layout.json"
    write_layouts(layout, [HeadLayout((4, None))])
    assert convert(model, out, "--layout", layout, "--text", short, "--needle-lengths") == 0
    content = json.loads((out / "conversion.json").read_text())
    assert len(content["samples"]) == 2
    assert content["losses"] == content["latency"] == {}


@pytest.mark.parametrize("limit", [None, 2, 3, 100, 4096])
@pytest.mark.parametrize("tokens", [0, 3, 4, 300, 10**6])
def test_sizes_fit(tokens, limit):
    fitted = fit_sizes(ReportSizes(), tokens, limit)
    assert fitted.samples in (0, 2)
    if fitted.samples:
        assert 2 * fitted.prompt_tokens <= tokens
        assert limit is None or fitted.prompt_tokens + fitted.sample_tokens <= limit
    is_roomy = tokens >= 512 and (limit is None or limit >= 320)
    assert (fitted.prompt_tokens, fitted.sample_tokens) == (256, 64) or not is_roomy
    assert all(2 * length <= tokens for length in fitted.lengths)


@pytest.mark.parametrize(
    "bad", [{"lengths": (1,)}, {"needle_depths": (1.5,)}, {"needle_samples": 1}, {"samples": -1}], ids=str
)
def test_sizes_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        ReportSizes(**bad)


def write_other_layout(folder):
    file = folder / "other.json"
    heads = find_heads(random_llama())
    write_layouts(file, heads.layouts(heads.candidates, WINDOW, 2))
    return file


def interrupt(monkeypatch, name):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, name, interrupted)


def test_with_a_budget_the_model_is_inspected_first(original, text, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--keep", "17%", "--window", 8, "--length", 64, "--windows", 1, 1, 1, "--no-report")
    assert convert(original, out, "--text", text, *options) == 0
    assert "(proposed)" in capsys.readouterr().out
    assert layouts_of(load(out)) == read_layouts(out / "inspection" / "layout.json")
    assert not (out / "report.html").exists()


def test_weights_keep_their_dtype(text, layout, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = random_llama().bfloat16()
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    assert convert(source, out, "--layout", layout, "--text", text, "--no-report") == 0
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(
        torch.equal(weights[name], weight) for name, weight in load_file(source / "model.safetensors").items()
    )
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize("is_tied", [False, True])
def test_saving_in_another_dtype_changes_no_bit_of_the_model(is_tied, tmp_path):
    model: Any = random_llama(tie_word_embeddings=is_tied)
    pretrained = Pretrained(model, byte_tokenizer(), torch.bfloat16)
    before = {name: x.clone() for name, x in (*model.named_parameters(), *model.named_buffers())}
    assert any("inv_freq" in name for name in before)
    dtype = model.config.dtype
    save_into(pretrained, tmp_path)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(x, before[name]), name
    assert (model.dtype, model.config.dtype) == (torch.float32, dtype)

    loaded = load(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != is_tied
    weights = dict(model.named_parameters())
    assert all(torch.equal(x, weights[name].bfloat16()) for name, x in loaded.named_parameters())


def test_nothing_is_overwritten(original, layout, text, converted, fails, tmp_path):
    message = fails(1, "convert", original, converted, "--layout", layout, "--text", text)
    assert "exists already and is not empty" in message
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "exists already" in fails(1, "convert", original, folder, "--layout", layout)
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]


def test_a_layout_of_another_model_is_refused_before_anything_is_written(original, tmp_path, text, fails):
    layout = tmp_path / "layout.json"
    content = json.dumps({"format": "longshort layouts 1", "layouts": [None]})
    layout.write_text(content)
    message = fails(1, "convert", original, tmp_path / "out", "--layout", layout, "--text", text)
    assert "layouts must have one entry for each of the 3 layers, got 1" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--keep", "25%"),
        ("--max-rise", 0.1),
        ("--window", 64),
        ("--sink-tokens", 0),
        ("--length", 512),
        ("--windows", 1, 1, 1),
        ("--measure", "loss"),
        ("--cache-length", 100),
    ],
    ids=lambda options: options[0],
)
def test_flags_of_an_inspection_do_not_go_with_a_layout(fails, options):
    message = fails(2, "convert", "a", "b", "--layout", "layout.json", *options)
    assert f"--layout is a layout: it does not go with {options[0]}, of an inspection" in message


def test_the_card_has_the_losses_of_the_report(converted_once, original):
    card: Any = ModelCard.load(converted_once / "README.md")
    losses = json.loads((converted_once / "conversion.json").read_text())["losses"]
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {
        f"loss (nats per token) in windows of {length} tokens": both["after"]["loss"]
        for length, both in losses.items()
    }
    assert {result.dataset_name for result in card.data.eval_results} == {"text.txt"}
    before = losses["64"]["before"]["loss"]
    assert f"| loss (nats per token) in windows of 64 tokens | {before:.4f} | the original |" in card.text
    assert card.data.base_model is None and str(original.parent) not in str(card)
    assert "tokenizer = AutoTokenizer" in card.text


def test_the_card_of_the_original_gives_its_license(original, text, layout, tmp_path):
    source, out = shutil.copytree(original, tmp_path / "source"), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: user/base\n---\n# Mine\n")
    assert convert(source, out, "--layout", layout, "--text", text, "--no-report") == 0
    card: Any = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert card.data.eval_results is None
    assert "those of the original" in card.text

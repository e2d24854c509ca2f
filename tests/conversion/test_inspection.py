"""Inspection: the one head that needs distant tokens is found under every budget, and found again at once."""

import json

import pytest
import torch
from tests.conversion.models import (
    DECOY,
    PLANTED,
    periodic_text,
    planted_model,
    random_llama,
    random_windows,
    save_short_gpt2,
)

from longshort.cli import main
from longshort.conversion import inspection
from longshort.conversion.budget import KeepHeads, LimitCache, LimitRise
from longshort.conversion.heads import find_heads
from longshort.conversion.inspection import inspect_heads
from longshort.conversion.journal import Journal
from longshort.conversion.layout_file import read_layouts
from longshort.conversion.reports import excess_text
from longshort.huggingface import apply, layouts_of

PARTS = [periodic_text(4, seed) for seed in range(3)]
WINDOW = 8


def inspect(tmp_path, budget, model=None, **options):
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        model = planted_model() if model is None else model
        return inspect_heads(model, PARTS, budget, window=WINDOW, sink_tokens=1, journal=journal, **options)


@pytest.fixture(scope="module")
def quarter(tmp_path_factory):
    """The inspection that keeps a quarter of the heads, and its calls of `progress`."""
    seen = []
    found = inspect(
        tmp_path_factory.mktemp("quarter"),
        KeepHeads(0.25),
        progress=lambda done, total: seen.append((done, total)),
    )
    return found, seen


def test_the_planted_head_alone_matters():
    model = planted_model()
    heads = find_heads(model)
    assert len(heads.candidates) == 4
    losses = {}
    for kept in (heads.candidates, (PLANTED,), set(heads.candidates) - {PLANTED}):
        apply(model, heads.layouts(kept, WINDOW, 1))
        with torch.no_grad():
            losses[len(kept)] = model(PARTS[0], labels=PARTS[0]).loss.item()
    assert losses[1] == pytest.approx(losses[4], abs=0.02)
    assert losses[3] > losses[4] + 1


@pytest.mark.parametrize("measure", ["gate", "loss"])
@pytest.mark.parametrize("budget", [KeepHeads(0.25), LimitRise(0.1), LimitCache(60_000, 100, 4)], ids=str)
def test_the_head_that_needs_the_distance_is_found(tmp_path, budget, measure):
    model = planted_model()
    found = inspect(tmp_path, budget, model, measure=measure)
    assert found.best.kept == {PLANTED}
    assert found.best.name in ("heads", "mixed")
    assert all(rise < 0.03 for rise in found.best.rises.values())
    assert max(found.scores, key=lambda head: found.scores[head]) == PLANTED
    assert found.layouts[1] is not None and found.layouts[1].windows == (None, WINDOW)
    assert (layouts_of(model), model.config._attn_implementation) == (None, "sdpa")


@pytest.mark.parametrize("nats", [0.001, 0.03, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_a_limit_of_the_rise_holds_on_ranking_and_choice(tmp_path, nats, seed):
    parts = [random_windows(count, 48, 10 * seed + count) for count in (1, 2, 3)]
    model = random_llama()
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        options = {"window": 2, "sink_tokens": 0, "journal": journal}
        found = inspect_heads(model, parts, LimitRise(nats), **options)
    for proposal in found.proposals:
        if proposal.name != "mass":  # is for information, with as many heads
            assert max(proposal.rises["ranking"], proposal.rises["choice"]) <= nats + 1e-9
    assert found.excess == max(0.0, found.best.rises["report"] - nats)
    assert bool(excess_text(found)) == (found.excess > 0)


def test_without_a_limit_there_is_no_excess(tmp_path):
    found = inspect(tmp_path, KeepHeads(0.0))
    assert found.best.rises["report"] > 1
    assert found.excess == 0
    assert excess_text(found) is None


def test_mass_is_no_guide(quarter):
    found, _ = quarter
    assert max(found.mass, key=lambda head: found.mass[head]) == DECOY
    by_mass = found.proposals[-1]
    assert (by_mass.name, by_mass.kept) == ("mass", {DECOY})
    assert by_mass.rises["report"] > 1


def test_layers_go_together(tmp_path):
    found = inspect(tmp_path, KeepHeads(0.5))
    by_name = {proposal.name: proposal for proposal in found.proposals}
    assert by_name["layers"].kept == {(1, 0), (1, 1)}


def test_rises_are_those_of_the_layouts(quarter):
    found, _ = quarter
    model = planted_model()
    for part, windows in zip(("ranking", "choice", "report"), PARTS, strict=True):
        with torch.no_grad():
            before = model(windows, labels=windows).loss.item()
        assert found.losses[part] == pytest.approx(before, rel=1e-5)
    for proposal in found.proposals:
        apply(model, found.heads.layouts(proposal.kept, WINDOW, 1))
        with torch.no_grad():
            after = model(PARTS[2], labels=PARTS[2]).loss.item()
        assert proposal.rises["report"] == pytest.approx(after - before, rel=1e-4, abs=1e-6)


def test_an_interrupted_inspection_resumes(quarter, tmp_path, monkeypatch):
    truth, _ = quarter
    calls = 0
    measure_slopes = inspection.measure_slopes

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return measure_slopes(*args)

    monkeypatch.setattr(inspection, "measure_slopes", interrupted)
    model = planted_model()
    with pytest.raises(KeyboardInterrupt):
        inspect(tmp_path, KeepHeads(0.25), model)
    assert layouts_of(model) is None
    found = inspect(tmp_path, KeepHeads(0.25), model)
    assert (found.proposals, found.scores) == (truth.proposals, truth.scores)
    in_all = calls
    assert inspect(tmp_path, KeepHeads(0.25), model).proposals == truth.proposals
    assert calls == in_all


def test_progress_ends_at_the_whole(quarter):
    _, seen = quarter
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == pytest.approx(seen[-1][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be"),
        ({"sink_tokens": -1}, "sink_tokens must be"),
        ({"measure": "mass"}, "measure must be 'gate' or 'loss', got 'mass'"),
        ({"window": 47}, r"parts must hold windows longer than window \+ sink_tokens = 48, got 48 tokens"),
        (
            {"parts": [torch.zeros(1, 49, dtype=torch.long)] * 3},
            "parts must hold windows of at most 48 tokens, the model's learned positions, got 49",
        ),
        ({"parts": PARTS[:2]}, "parts must be windows for ranking, choice, report, got 2 parts"),
    ],
)
def test_bad_arguments_are_named(tmp_path, changes, message):
    options = {"parts": PARTS, "window": WINDOW, "sink_tokens": 1, **changes}
    parts = options.pop("parts")
    with Journal(tmp_path / "journal.jsonl", {}) as journal, pytest.raises(ValueError, match=message):
        inspect_heads(planted_model(), parts, KeepHeads(0.25), journal=journal, **options)


def test_a_model_with_layouts_is_refused(tmp_path):
    model = random_llama()
    apply(model, num_global_heads=2, window=8)
    windows = [random_windows(1, 20)] * 3
    with Journal(tmp_path / "j", {}) as journal, pytest.raises(ValueError, match="must be without layouts"):
        inspect_heads(model, windows, KeepHeads(0.25), window=4, sink_tokens=0, journal=journal)


def test_the_command_writes_a_layout_and_a_report(original, text, tmp_path, capsys):
    options = ["--text", str(text), "--length", "64", "--window", "8", "--windows", "2", "1", "2"]
    options += ["--out", str(tmp_path / "out")]
    assert main(["inspect", str(original), "--keep", "34%", *options]) == 0
    shown = capsys.readouterr().out
    assert "(proposed)" in shown
    layouts = read_layouts(tmp_path / "out" / "layout.json")
    assert sum(layout.windows.count(None) for layout in layouts if layout is not None) <= 4
    content = json.loads((tmp_path / "out" / "layout.json").read_text())
    assert (content["window"], content["sink_tokens"], len(content["kv_heads"])) == (8, 4, 6)
    assert {proposal["name"] for proposal in content["proposals"]} == {"heads", "layers", "mixed", "mass"}
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 2

    size = (tmp_path / "out" / "journal.jsonl").stat().st_size
    assert main(["inspect", str(original), "--keep", "34%", *options]) == 0
    assert capsys.readouterr().out == shown
    assert (tmp_path / "out" / "journal.jsonl").stat().st_size == size
    options[options.index("8")] = "9"
    assert main(["inspect", str(original), *options]) == 1
    assert "holds measurements with another window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "half"], "--keep must be a share"),
        (["--keep", "25%", "--max-rise", "0.1"], "exclude each other"),
        (["--max-cache", "1GG"], "--max-cache must be a size"),
        (["--max-rise", "0"], "--max-rise must be"),
        (["--length", "40", "--window", "37"], "--length must be more than --window + --sink-tokens = 41"),
        (["--windows", "1", "0", "1"], "--windows must be at least 1 each"),
    ],
)
def test_bad_flags_are_usage_errors(fails, options, message):
    assert message in fails(2, "inspect", "model", *options)


def test_flags_that_do_not_fit_the_model_are_named(text, tmp_path, fails):
    model, out = tmp_path / "model", tmp_path / "out"
    save_short_gpt2(model)
    options = ["inspect", model, "--text", text, "--out", out, "--window", 8, "--windows", 1, 1, 1]
    message = fails(1, *options, "--length", 49)
    assert "--length must be at most 48, the model's learned positions, got 49" in message
    message = fails(1, *options, "--length", 48, "--max-cache", "512B")
    assert "--max-cache must be at least" in message


def test_missing_things_are_named(original, tmp_path, fails):
    assert "there is no folder" in fails(1, "inspect", str(tmp_path / "none"))
    assert "none.txt" in fails(1, "inspect", original, "--text", str(tmp_path / "none.txt"))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    message = fails(1, "inspect", original, "--text", str(short), "--out", str(tmp_path / "out"))
    assert "text must have at least" in message
    assert not (tmp_path / "out").exists()

import json
import subprocess
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch

from longshort.cli import main
from longshort.studies import demo
from longshort.studies.demo import DemoProgress, DemoSettings, run_demo, summarize_training
from longshort.training.metrics import MetricsLog, read_metrics
from longshort.training.run import read_run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(
            "".join(f"line {line * number % 17}\n" for line in range(60))
        )
    return folder


SMALL = ["--sequence-length", "64", "--tokens-per-step", "128", "--evaluation-tokens", "1000"]


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A small demo, by its command: the folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    shown = StringIO()
    with redirect_stdout(shown):
        assert main(["demo", "--out", str(out), "--source", str(source), "--steps", "20", *SMALL]) == 0
    return out, shown.getvalue()


def test_the_demo_leaves_everything_in_its_folder(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == {
        "data", "ls", "mhsa", "ls.log", "mhsa.log", "plots", "demo.json", "report.html"
    }  # fmt: skip
    assert {path.name for path in (out / "plots").iterdir()} == {
        "loss.png", "logits.png", "heads.png", "position.png"
    }  # fmt: skip


def test_the_models_differ_in_their_heads_alone(finished):
    out, _ = finished
    local, full = read_run(out / "ls"), read_run(out / "mhsa")
    assert [local.model["num_global_heads"], full.model["num_global_heads"]] == [1, 4]
    assert {name for name in local.model if local.model[name] != full.model[name]} == {"num_global_heads"}
    one, other = vars(local.training), vars(full.training)
    assert {name for name in one if one[name] != other[name]} == {"mhsa", "global_heads", "out"}
    weights, others = local.build_model().state_dict(), full.build_model().state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert weights.keys() == others.keys()


def test_the_numbers_are_those_of_the_runs(finished):
    out, shown = finished
    numbers = json.loads((out / "demo.json").read_text())["models"]
    assert list(numbers) == ["LS-attention", "MHSA"]
    assert numbers["LS-attention"]["parameters"] == numbers["MHSA"]["parameters"]
    for name, folder in demo.MODELS.items():
        last = read_metrics(out / folder)[-1]
        assert last["step"] == 20
        assert numbers[name]["max_logit"] == last["max_logit"]
        assert numbers[name]["evaluation"]["tokens"] <= 1000
        assert f"{numbers[name]['evaluation']['loss']:.4g}" in shown
        assert numbers[name]["sample"] in shown


def test_the_report_is_one_file(finished):
    out, shown = finished
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "Loss: after" in page
    assert "Loss: after" in shown
    assert "longshort train tiny --data" in page
    assert demo.SETTING[:40] in page
    assert str(out / "report.html") in shown


def test_an_earlier_demo_is_kept(finished, source, capsys):
    out, _ = finished
    before = (out / "report.html").read_bytes()
    assert main(["demo", "--out", str(out), "--source", str(source), *SMALL]) == 1
    assert "--overwrite replaces an earlier demo" in capsys.readouterr().err
    assert (out / "report.html").read_bytes() == before


def test_a_failed_training_ends_the_demo(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("too short")
    settings = DemoSettings(out=tmp_path / "out", source=f"{tmp_path}/*.txt", steps=5)
    with pytest.raises(
        ChildProcessError, match=r"training .* failed, see .*\.log: longshort: error: .* tokens"
    ):
        run_demo(settings)


def test_an_interrupted_demo_leaves_no_process(source, tmp_path, monkeypatch):
    processes = []
    start = subprocess.Popen

    def remember(*arguments, **options):
        processes.append(start(*arguments, **options))
        return processes[-1]

    class Impatient(DemoProgress):
        def on_training(self, name, step, record):
            assert record["step"] == step
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remember)
    settings = DemoSettings(
        tmp_path / "out", source=str(source), steps=100_000, sequence_length=64, tokens_per_step=64
    )
    with pytest.raises(KeyboardInterrupt):
        run_demo(settings, Impatient())
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_touched(tmp_path, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("a demo's")
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="thesis" if overwrite else "not empty"):
        run_demo(DemoSettings(out, overwrite=overwrite))
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "thesis.tex"]


def test_a_file_is_no_place_for_a_demo(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a folder"):
        run_demo(DemoSettings(tmp_path / "out", overwrite=True))
    assert (tmp_path / "out").read_text() == "precious"


class StoppedError(Exception):
    """Raised by a display, to end a demo at its first word."""


class Stopper(DemoProgress):
    def on_stage(self, text):
        raise StoppedError


def old_demo(out):
    (out / "ls").mkdir(parents=True)
    (out / "ls" / "metrics.jsonl").write_text("old")
    (out / "demo.json").write_text("old")
    return out


def test_overwriting_removes_an_earlier_demo_and_what_a_killed_one_left(source, tmp_path):
    out = old_demo(tmp_path / "out")
    for name in (".data.lock", ".ls.partial", ".demo.json.x7.partial"):
        (out / name).write_text("half")
    with pytest.raises(StoppedError):
        run_demo(DemoSettings(out, overwrite=True, source=source), Stopper())
    assert not list(out.iterdir())


def test_a_wrong_source_leaves_an_earlier_demo_alone(tmp_path):
    out = old_demo(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_demo(DemoSettings(out, overwrite=True, source=str(tmp_path / "nowhere")))
    assert (out / "demo.json").read_text() == (out / "ls" / "metrics.jsonl").read_text() == "old"


def test_a_demo_whose_trainings_still_run_is_not_replaced(source, tmp_path):
    out = old_demo(tmp_path / "out")
    log = MetricsLog(out / "ls")
    try:
        with pytest.raises(BlockingIOError, match="being trained by another process"):
            run_demo(DemoSettings(out, overwrite=True, source=source))
    finally:
        log.close()
    assert (out / "demo.json").read_text() == "old"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps"),
        ({"seed": -1}, "--seed"),
        ({"sequence_length": 1000}, "--tokens-per-step must be a multiple of --sequence-length"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"evaluation_tokens": 0}, "--evaluation-tokens"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(tmp_path / "out", **changes)


def metrics(logits, in_band=None, local=None):
    lines = []
    for index, logit in enumerate(logits, start=1):
        line = {
            "step": index,
            "tokens": index * 100,
            "loss": 2.0,
            "tokens_per_second": 50.0 * (1 + index % 2),
        }
        line |= {"max_logit": logit}
        line |= {} if in_band is None else {"max_logit_global_in_band": in_band[index - 1]}
        line |= {} if local is None else {"max_logit_local": local[index - 1]}
        lines.append(line)
    return lines


def test_the_end_of_training_is_its_last_tenth():
    summary = summarize_training(metrics([*[10.0] * 15, 20.0, 5.0, 5.0, 30.0, 25.0]))
    assert summary["max_logit"] == 30
    assert summary["logit_growth"] == 3
    assert summary["max_logit_in_band"] is None
    assert summary["first_not_finite"] is None
    assert summary["tokens_per_second"] == 75
    assert summary["training_seconds"] == pytest.approx(10 * 100 / 100 + 10 * 100 / 50)


def test_inside_the_window_local_heads_count_too():
    assert summarize_training(metrics([9.0], [3.0], [4.0]))["max_logit_in_band"] == 4
    assert summarize_training(metrics([9.0], [3.0]))["max_logit_in_band"] == 3


def test_a_diverged_training_is_summarized():
    lines = metrics([1.0] * 5 + [None] * 5, [1.0] * 5 + [None] * 5)
    lines[5]["loss"] = None
    summary = summarize_training(lines)
    assert summary["max_logit"] is None
    assert summary["max_logit_in_band"] is None
    assert summary["logit_growth"] is None
    assert summary["first_not_finite"] == 6

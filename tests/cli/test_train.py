import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from tests.cli.conftest import SHAPE

from longshort.cli import main
from longshort.training.checkpoints import latest_checkpoint
from longshort.training.config import TrainConfig
from longshort.training.metrics import MetricsLog, read_metrics
from longshort.training.run import read_run


def test_a_run_has_everything(trained):
    entries = {path.name for path in trained.iterdir()}
    folders = {"tokenizer", "checkpoints", "plots", "tensorboard"}
    assert entries == {"config.json", "metrics.jsonl", "report.html", *folders}
    assert {path.stem for path in (trained / "plots").iterdir()} == {"loss", "logits", "entropy", "heads"}
    assert read_metrics(trained)[-1]["step"] == 12


@pytest.mark.parametrize("ends_with", ["reader", "signal"])
def test_a_training_outlives_whoever_reads_its_output(data, tmp_path, monkeypatch, ends_with):
    """`train | head`, and Ctrl-C on `train | tee`, where the same signal ends tee first."""
    out = tmp_path / "run"
    write = MetricsLog.write
    if ends_with == "signal":
        monkeypatch.setattr(
            MetricsLog, "write", lambda *arguments: (write(*arguments), signal.raise_signal(signal.SIGINT))
        )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        command = ["train", "tiny", "--data", str(data), "--out", str(out), *SHAPE]
        command += ["--steps", "4", "--log-every", "1"]
        assert main(command) == (0 if ends_with == "reader" else 130)
    assert latest_checkpoint(out) is not None
    assert (out / "report.html").is_file()


def test_flags_become_settings(data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--steps", "3", "--checkpoint-every", "2", "--log-every", "1", "--seed", "3", "--window", "5"]
    flags += [
        "--mhsa",
        "--qk-norm",
        "--learning-rate",
        "1e-3",
        "--schedule",
        "constant",
        "--monitor-every",
        "0",
    ]
    assert main(["train", "tiny", "--data", str(data), "--out", str(out), *SHAPE[:-2], *flags]) == 0
    settings = read_run(out).training
    assert type(settings) is TrainConfig
    assert (settings.steps, settings.seed, settings.window, settings.learning_rate) == (3, 3, 5, 1e-3)
    assert settings.mhsa
    assert settings.qk_norm
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-2", "step-3"]
    counts = r"tiny with MHSA: ([\d,]+) parameters \(with LS-attention: ([\d,]+)\)"
    ((own, twin),) = re.findall(counts, capsys.readouterr().out)
    assert own == twin


def test_a_preset_may_be_a_file(fails, data, tmp_path, capsys):
    file, out = tmp_path / "mine.json", tmp_path / "run"
    shape = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
    fields = {"layouts": [[4, None], [9, 4]], "qk_norm": True, **shape}
    file.write_text(json.dumps(fields))
    call = ["train", str(file), "--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "2"]
    assert main(call) == 0
    run = read_run(out)
    assert {name: run.model[name] for name in fields} == fields
    assert run.band == 9
    assert f"{file} with LS-attention: " in capsys.readouterr().out.replace("\n", "")
    file.unlink()
    assert main(["train", "--resume", str(out), "--steps", "3"]) == 0
    assert read_metrics(out)[-1]["step"] == 3
    assert "there is no file" in fails(1, "train", file, "--data", data, "--out", tmp_path / "other")
    file.write_text('{"windows": 3}')
    assert "got ['windows']" in fails(2, "train", file, "--data", data, "--out", tmp_path / "other")


def test_a_run_that_spikes_ends_with_its_own_code(data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--steps", "4", "--learning-rate", "1e30", "--grad-clip", "0", "--z-loss", "1e-4"]
    flags += [
        "--on-spike",
        "rollback",
        "--max-rollbacks",
        "1",
        "--rollback-steps",
        "2",
        "--skip-batches",
        "3",
    ]
    flags += ["--sink-logits", "--short-convolution", "3", "--qk-clip", "100", "--log-every", "1"]
    capsys.readouterr()
    assert main(["train", "tiny", "--data", str(data), "--out", str(out), *SHAPE, *flags]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("spike")] == ["spike at step 2"] * 2
    assert [line["step"] for line in read_metrics(out, abandoned=True)] == [1, 2, 1, 2]
    assert "2 steps" in (out / "report.html").read_text()
    settings = read_run(out).training
    assert (settings.sink_logits, settings.short_convolution, settings.qk_clip) == (True, 3, 100.0)


def test_progress_elsewhere_than_on_a_terminal_is_lines(data, tmp_path, capsys):
    capsys.readouterr()
    assert (
        main(["train", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "4", *SHAPE])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].startswith("tiny with LS-attention: ")
    assert re.fullmatch(
        r"step 4/4  loss \d\.\d{4}  validation \d\.\d{4}  largest logit \d+\.\d  [\d,]+ tokens/s  0 s left",
        lines[-2],
    )
    assert lines[-1] == f"report: {tmp_path / 'run' / 'report.html'}"


def test_the_share_of_a_given_peak_stands_beside_the_speed(data, tmp_path, capsys):
    capsys.readouterr()
    flags = ["--steps", "2", "--peak-tflops", "0.001", *SHAPE]
    assert main(["train", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 0
    line = capsys.readouterr().out.splitlines()[-2]
    share = read_metrics(tmp_path / "run")[-1]["mfu"]
    assert f" tokens/s  MFU {100 * share:.1f} %  " in line


def test_resume_goes_on(run, capsys):
    assert main(["train", "--resume", str(run), "--steps", "15"]) == 0
    assert "resuming after step 12" in capsys.readouterr().out
    assert read_metrics(run)[-1]["step"] == 15
    assert "15 steps" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tiny", "--preset", "tiny"], "--preset"),
        (["huge"], "tiny"),
        (["tiny", "--steps", "0"], "--steps"),
        (["tiny", "--steps", "1.5"], "--steps"),
        (["tiny", "--steps"], "--steps"),
        (["tiny", "--learning-rate", "-1"], "--learning-rate"),
        (["tiny", "--schedule", "linear"], "--schedule"),
        (["tiny", "--window", "0"], "--window"),
        (["tiny", "--mhsa", "--global-heads", "1"], "--mhsa"),
        (["tiny", "--global-heads", "5"], "num_global_heads"),
        (["tiny", "--kv-heads", "3"], "num_key_value_heads"),
        (["tiny", "extra"], "extra"),
        (["tiny", "--monitor-row-range", "--monitor-every", "0"], "--monitor-row-range needs"),
        (
            ["tiny", "--interleave", "4"],
            "--interleave goes only with --token-order interleaved, got text",
        ),
        (
            ["tiny", "--on-spike", "stop", "--rollback_steps=100"],
            "--rollback-steps goes only with --on-spike rollback, got stop",
        ),
        (["tiny", "--skip-batches", "1"], "--skip-batches goes only with --on-spike rollback, got None"),
        (["tiny", "--max-rollbacks", "1"], "--max-rollbacks goes only with --on-spike rollback"),
    ],
    ids=str,
)
def test_wrong_usage(fails, data, tmp_path, flags, message):
    assert message in fails(2, "train", *flags, "--data", data, "--out", tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["PRESET", "--data", "--out"])
def test_what_is_missing_is_named(fails, missing):
    arguments = {"PRESET": ["tiny"], "--data": ["--data", "d"], "--out": ["--out", "r"]}
    given = [word for name, words in arguments.items() if name != missing for word in words]
    assert missing in fails(2, "train", *given)


@pytest.mark.parametrize(
    "flags",
    [["--steps", "0"], ["--threads", "0"], ["--seed", "1"], ["tiny"], ["--out", "x"]],
    ids=str,
)
def test_wrong_usage_of_resume(fails, run, flags):
    fails(2, "train", "--resume", run, *flags)


def test_resume_needs_a_run(fails, tmp_path):
    fails(2, "train", "--resume")
    assert "not the folder of a run" in fails(1, "train", "--resume", tmp_path)
    assert "not the folder of a run" in fails(1, "train", f"--resume={tmp_path / 'nowhere'}")


def test_missing_data_are_a_failure(fails, tmp_path):
    message = fails(1, "train", "tiny", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert "longshort data" in message
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_a_failure(fails, data, tmp_path):
    message = fails(
        1, "train", "tiny", "--data", data, "--out", tmp_path / "run", "--sequence-length", "100000"
    )
    assert "100000" in message
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten(fails, data, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "exists" in fails(1, "train", "tiny", "--data", data, "--out", run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_ctrl_c_saves_reports_and_says_how_to_go_on(data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "longshort", "train", "tiny", "--data", str(data), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--steps", "100000", "--log-every", "1", "--evaluate-every", "0", *SHAPE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not read_metrics(out):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"longshort train --resume {out}" in shown
    assert (out / "report.html").is_file()
    stopped = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{stopped}"]
    assert main(["train", "--resume", str(out), "--steps", str(stopped + 1)]) == 0
    assert read_metrics(out)[-1]["step"] == stopped + 1

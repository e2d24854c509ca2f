"""The scale gpu: four trainings in calls of minutes, and what leaves the machine.

The runs here have a narrow model and short sequences; the code is the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.studies.in_process import run_here
from tests.studies.planted import fill, noise

from longshort.cli import main
from longshort.model import LongShortForCausalLM, parameter_count
from longshort.reporting.page import Report, render_report
from longshort.studies import catalogue
from longshort.studies.catalogue import STUDIES, StudySettings, run_studies
from longshort.studies.framework import runner
from longshort.studies.framework.comparison import rate_text
from longshort.studies.framework.store import RESULTS_FILE
from longshort.studies.language.arms import ONE_GPU, model_config
from longshort.studies.progress.study import Progress
from longshort.training.checkpoints import latest_checkpoint
from longshort.training.metrics import METRICS_FILE, read_metrics
from longshort.training.trained import open_trained

SCALES = Progress.scales
STEPS = 60
NAMES = ["LS-3e-3-seed-0", "LS-6e-4-seed-0", "MHSA-3e-3-seed-0", "MHSA-6e-4-seed-0"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"text {number} says {number * 7} and ends\n" * 60)
    return folder


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """The scale with a narrow model of as many layers and heads."""
    model = {**ONE_GPU.model, "hidden_size": 24, "head_dim": 4, "local_window": 8}
    train = {**ONE_GPU.train, "sequence_length": 64, "batch_size": 2, "steps": STEPS, "warmup_steps": 5}
    train |= {"decay_steps": 6, "evaluate_every": 6, "monitor_every": 6, "checkpoint_every": 15}
    setting = replace(ONE_GPU, model=model, train={**train, "validation_windows": 2})
    small = replace(SCALES["gpu"], pair=setting, stress=setting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "scales", {**SCALES, "gpu": small})
        yield


def settings(texts, out, **changes):
    return StudySettings("progress", scale="gpu", source=str(texts), out=out, jobs=2, device="cpu", **changes)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    chosen = settings(texts, tmp_path_factory.mktemp("whole") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "run_trials", run_here)
        return chosen, run_studies(chosen)


def test_four_trainings_end_with_models_in_bf16(whole):
    chosen, report = whole
    assert report.is_done
    models = chosen.folder / "progress" / "models"
    assert sorted(path.name for path in models.iterdir()) == NAMES
    for folder in models.iterdir():
        model = LongShortForCausalLM.from_pretrained(folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json", "generation_config.json", METRICS_FILE, "model.safetensors"
        ]  # fmt: skip
        assert len(read_metrics(folder)) == STEPS
    results = (chosen.folder / "progress" / RESULTS_FILE).read_text().splitlines()
    assert len(results) == 4
    for record in map(json.loads, results):
        rate = rate_text(record["settings"]["train"]["learning_rate"])
        last_line = read_metrics(models / f"{record['arm']}-{rate}-seed-0")[-1]
        assert last_line["validation_loss"] == record["result"]["validation_loss"]


def test_weights_are_those_of_the_run_rounded(whole):
    chosen, _ = whole
    runs = [path for path in (chosen.folder / "runs").iterdir() if path.is_dir()]
    assert len(runs) == 4
    for trained in map(open_trained, runs):
        training = trained.config.training
        name = f"{'MHSA' if training.mhsa else 'LS'}-{rate_text(training.learning_rate)}-seed-0"
        copy = LongShortForCausalLM.from_pretrained(chosen.folder / "progress" / "models" / name)
        for theirs, ours in zip(trained.model.parameters(), copy.parameters(), strict=True):
            assert torch.equal(theirs.to(torch.bfloat16), ours)


@pytest.mark.slow
def test_calls_of_minutes_come_to_the_same_results(whole, texts, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def clock() -> float:
        """The time is over once a training is at work."""
        files = out.glob(f"runs/*/{METRICS_FILE}")
        return 1e12 if any(len(file.read_text().splitlines()) > 8 for file in files) else 0.0

    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=clock))
    report = run_studies(settings(texts, out, minutes=1000))
    assert not report.is_done
    assert report.file.is_file()
    stopped = []
    for checkpoint in map(latest_checkpoint, out.glob("runs/*/")):
        if checkpoint is not None:
            stopped.append(int(checkpoint.name.removeprefix("step-")))
            assert read_metrics(checkpoint.parent.parent)[-1]["step"] == stopped[-1]  # no step is lost
    assert 0 < min(stopped) < STEPS
    exported = list((out / "progress" / "models").iterdir())
    assert sorted(read_metrics(folder)[-1]["step"] for folder in exported) == sorted(stopped)

    monkeypatch.undo()
    assert run_studies(settings(texts, out, minutes=1000)).is_done
    for file in (RESULTS_FILE, *(f"models/{name}/model.safetensors" for name in NAMES)):
        ours, theirs = (folder / "progress" / file for folder in (out, whole[0].folder))
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_the_end_of_the_minutes_has_an_exit_code_and_says_how_to_resume(texts, tmp_path, capsys):
    command = ["study", "progress", "--scale", "gpu", "--source", str(texts), "--out", str(tmp_path / "out")]
    assert main([*command, "--minutes", "1e-6", "--jobs", "1"]) == 4
    assert "the same command resumes" in capsys.readouterr().out.replace("\n", " ")
    assert not list(tmp_path.glob("out/runs/*/checkpoints"))


def test_four_processes_share_one_gpu_by_default(texts, tmp_path, monkeypatch):
    seen = {}

    def note(work, scale, seeds, workplace, jobs, progress, ends_at):
        seen.update(jobs=jobs, device=workplace.device, tokenizer=workplace.tokenizer, seeds=seeds)
        seen["minutes"] = None if ends_at is None else 8
        return True

    monkeypatch.setattr(catalogue, "run_trials", note)
    run_studies(StudySettings("all", scale="gpu", source=str(texts), out=tmp_path / "out", minutes=8))
    assert seen == {
        "jobs": 4, "device": "auto", "tokenizer": "bytes", "seeds": {"progress": [0]}, "minutes": 8
    }  # fmt: skip


def test_the_trials_are_the_authors_small_model_at_two_rates():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "scales", SCALES)
        trials = STUDIES["progress"].plan("gpu", [0], {}).trials
    found = [(trial.arm, trial.settings["train"]["learning_rate"]) for trial in trials]
    assert sorted(found) == [("LS", 6e-4), ("LS", 3e-3), ("MHSA", 6e-4), ("MHSA", 3e-3)]
    for trial in trials:
        train = trial.settings["train"]
        assert (train["batch_size"], train["sequence_length"], train["precision"]) == (32, 2048, "bf16")
        config = model_config(trial.settings["model"], train)
        assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (6, 6, 32)
        assert (config.hidden_size, config.vocab_size) == (192, 257)
        assert {layout.windows for layout in config.head_layouts()} == {
            (None,) * 6 if trial.arm == "MHSA" else (50,) * 5 + (None,)
        }


def test_what_leaves_the_machine_is_below_16_mb_a_trial(whole):
    """Weights are counted from the config; lines of metrics are those of as many layers and heads."""
    chosen, _ = whole
    config = model_config(ONE_GPU.model, ONE_GPU.train)
    weights = 2 * parameter_count(config)
    assert weights == 6_297_216
    for name in NAMES:
        folder = chosen.folder / "progress" / "models" / name
        small = LongShortForCausalLM.from_pretrained(folder).config
        overhead = (folder / "model.safetensors").stat().st_size - 2 * parameter_count(small)
        assert 0 < overhead < 20_000
        # Here a tenth of the lines hold a probe, there a fiftieth.
        metrics = (folder / METRICS_FILE).stat().st_size / STEPS * ONE_GPU.train["steps"]
        assert weights + overhead + metrics < 16_000_000
    everything = sum(
        path.stat().st_size for path in (chosen.folder / "progress").rglob("*")
        if path.is_file() and path.name not in (METRICS_FILE, "model.safetensors")
    )  # fmt: skip
    assert everything < 2_000_000


def test_verdicts_of_one_seed_claim_nothing(tmp_path):
    def result(trial):
        rate, is_ls = trial.settings["train"]["learning_rate"], trial.arm == "LS"
        curve = [[50 * number, 5.0 * 0.9**number] for number in range(1, 41)]
        steps = [step for step, _ in curve]
        logits = [(2.0 if is_ls else 60.0) + noise(trial)] * len(steps)
        probe = {"step": steps}
        for name in ("max_logit", "quantile", "row_range"):
            for suffix in ("", "_median", "_in_band"):
                probe[name + suffix] = logits
        return {
            "constant_until": 1800, "constant_loss": 1.0, "validation_loss": 1.0 + rate, "parameters": 1,
            "flops_per_step": 1.0, "tokens_per_step": 65_536, "loss": 1.0, "diverged_at": None, "spikes": 0,
            "validation_curve": curve, "loss_curve": curve, "probe": probe, "timing": {},
            "copying_curve": [[step, 4.7 - step / 500] for step in steps], "max_logit": logits[-1],
        }  # fmt: skip

    study = STUDIES["progress"]
    found = study.findings("gpu", [0], fill(study, "gpu", [0], result), tmp_path)
    assert {verdict.outcome.value for verdict in found.verdicts} == {
        "not shown at this scale", "not measured at this scale"
    }  # fmt: skip
    assert render_report(Report("progress", "", found.sections))

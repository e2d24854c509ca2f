from __future__ import annotations

import shutil

import pytest

from longshort.model import training_flops
from longshort.stability import ALARMS
from longshort.studies.explosion import Explosion
from longshort.studies.framework.study import Trial, Workplace
from longshort.studies.language.arms import (
    LS,
    MHSA,
    ONE_GPU,
    Setting,
    Variant,
    model_config,
    paper_base,
    tiny,
)
from longshort.studies.language.trial import run_folder, summarize, train_language_model
from longshort.training.checkpoints import FOLDER
from longshort.training.metrics import read_metrics

SETTING = tiny(64, batch=2, steps=6)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A small corpus of its own."""
    folder = tmp_path_factory.mktemp("studies")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text {number} says {number * 7} and ends\n" * 40)
    place = Workplace(folder, str(texts))
    Explosion().prepare(place)
    return place


def test_a_trial_is_a_pure_function_of_its_settings(workplace, tmp_path):
    trial = SETTING.trial(MHSA, 1e-3, seed=1)
    first = train_language_model(trial, workplace)
    again = train_language_model(trial, workplace)  # from the finished run
    (tmp_path / "data").symlink_to(workplace.folder / "data")
    elsewhere = train_language_model(trial, Workplace(tmp_path, workplace.source))
    for result in (first, again, elsewhere):
        result.pop("timing")
    assert first == again == elsewhere
    assert first["validation_curve"][-1][0] == 6
    assert first["row_range"] >= first["max_logit"] > 0


def test_the_work_of_a_trial_is_that_of_its_model():
    """Proportional to the operations of its steps, which differ by variant, length and size."""
    trials = [
        setting.trial(variant, 1e-3, seed=0)
        for setting in (SETTING, tiny(256, batch=3, steps=8))
        for variant in (LS, MHSA, LS.with_model("wide", hidden_size=128))
    ]
    operations = []
    for trial in trials:
        train = trial.settings["train"]
        config = model_config(trial.settings["model"], train)
        sequences = train["steps"] * train["batch_size"]
        operations.append(sequences * training_flops(config, train["sequence_length"]).total)
    ratios = [trial.work / count for trial, count in zip(trials, operations, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(trials))
    assert len(set(operations)) == len(trials)


def test_losses_are_per_byte(workplace):
    """The tokens of this corpus are bytes; were each of them two bytes, the losses would be half as large."""
    trial = SETTING.trial(MHSA, 1e-3, seed=1)
    result = train_language_model(trial, workplace)
    run = run_folder(trial.settings, workplace)
    logged = [line["validation_loss"] for line in read_metrics(run) if "validation_loss" in line]
    assert [loss for _, loss in result["validation_curve"]] == logged
    halved = summarize(run, trial.settings, bytes_per_token=2.0)
    assert halved["validation_loss"] == result["validation_loss"] / 2
    assert halved["loss"] == pytest.approx(result["loss"] / 2)


def test_arms_start_alike_and_differ(workplace):
    ls, mhsa = (train_language_model(SETTING.trial(arm, 1e-3, 0), workplace) for arm in (LS, MHSA))
    assert ls["loss_curve"][0][1] == pytest.approx(mhsa["loss_curve"][0][1], abs=0.02)
    assert ls["max_logit"] != mhsa["max_logit"]
    assert ls["flops_per_step"] < mhsa["flops_per_step"]


def test_a_needle_is_measured_where_it_is_asked_for(workplace):
    needle = {"lengths": [64], "depths": [0.5], "samples": 2}
    result = train_language_model(
        SETTING.trial(Variant("LS", measure={"needle": needle}), 1e-3, 0), workplace
    )
    assert [(cell["length"], cell["depth"]) for cell in result["needle"]] == [(64, 0.5)]


def test_scores_of_alarms_are_part_of_a_result(workplace):
    variant = LS.with_train("LS", alarms=True, monitor_every=1)
    setting = tiny(64, batch=2, steps=12)
    result = train_language_model(setting.trial(variant, 1e-3, 0), workplace)
    scores = result["alarm_scores"]
    assert list(scores) == ["step", *ALARMS] and scores["step"] == list(range(1, 13))
    assert scores["row-range"][:9] == [None] * 9 and None not in scores["row-range"][9:]
    for name in ("entropy", "update"):
        assert scores[name][0] == 0.0 and all(0 <= score < 1 for score in scores[name])
    assert all(score == float(f"{score:.4g}") for score in scores["update"])
    assert result["diverged_from"] is None
    assert "alarm_scores" not in train_language_model(SETTING.trial(LS, 1e-3, 0), workplace)


@pytest.mark.parametrize("length", [512, 8192])
def test_models_of_the_papers_size_are_built_and_stepped(workplace, length):
    """With short sequences, one layer and few steps: the code is the same."""
    setting = paper_base(length)
    model = {**setting.model, "num_hidden_layers": 1, "vocab_size": 257}
    train = {**setting.train, "sequence_length": 32, "batch_size": 2, "micro_batch_size": 1, "steps": 1}
    train |= {"warmup_steps": 0, "validation_windows": 1}
    trial = Setting(model, train, "").trial(LS, 3e-4, 0)
    assert train_language_model(trial, workplace)["loss"] > 0


def test_a_trial_with_hidden_keys_is_another_training(workplace, tmp_path):
    plain, *hidden = (SETTING.trial(Variant("LS", hidden_keys=share), 1e-3, 0) for share in (0.0, 0.5, 0.75))
    assert plain.settings == SETTING.trial(LS, 1e-3, 0).settings
    assert len({trial.key for trial in (plain, *hidden)}) == 3
    curves = [
        train_language_model(trial, workplace)["validation_curve"] for trial in (plain, *hidden, hidden[0])
    ]
    assert curves[1] == curves[3] and len({str(curve) for curve in curves}) == 3


def test_a_resumed_trial_hides_the_same_keys(workplace, tmp_path):
    """It stops after a checkpoint, as a signal would stop it, and goes on."""
    trial = SETTING.trial(Variant("LS", train={"checkpoint_every": 3}, hidden_keys=0.5), 1e-3, 5)
    results = []
    for name in ("whole", "parts"):
        place = Workplace(tmp_path / name, workplace.source)
        place.folder.mkdir()
        (place.folder / "data").symlink_to(workplace.folder / "data")
        result = train_language_model(trial, place)
        if name == "parts":
            (run,) = (place.folder / "runs").glob(f"*/{FOLDER}")
            assert len(list(run.iterdir())) == 2
            shutil.rmtree(run / "step-6")
            result = train_language_model(trial, place)
        result.pop("timing")
        results.append(result)
    assert results[0] == results[1]


def test_a_trial_starts_from_the_weights_of_another(workplace):
    first = SETTING.trial(MHSA, 1e-2, 0)
    trained = train_language_model(first, workplace)
    model = {**first.settings["model"], "layouts": [[None] * 4] * 2}
    settings = Setting(model, {**SETTING.train, "warmup_steps": 5}, "").trial(Variant("on"), 1e-9, 3).settings
    again = train_language_model(Trial("on", 3, {**settings, "start": first.settings}), workplace)
    new = train_language_model(Trial("new", 3, settings), workplace)
    assert again["validation_loss"] == pytest.approx(trained["validation_loss"], abs=1e-4)  # hardly any rate
    assert abs(new["validation_loss"] - trained["validation_loss"]) > 0.01


@pytest.mark.parametrize("arm", [LS, MHSA], ids=["LS", "MHSA"])
def test_the_model_for_one_gpu_is_built_and_stepped(workplace, arm):
    """At full width and depth, with short sequences and few steps."""
    train = {**ONE_GPU.train, "sequence_length": 64, "batch_size": 2, "steps": 2, "warmup_steps": 0}
    train |= {"decay_steps": 1, "evaluate_every": 1, "validation_windows": 2}
    trial = Setting(ONE_GPU.model, train, "").trial(arm, 6e-4, 0)
    result = train_language_model(trial, workplace)
    assert result["parameters"] == 3_148_608 - (2048 - 64) * 192
    assert result["probe"]["step"] == [1, 2]
    assert result["copying_curve"][-1][1] > 0

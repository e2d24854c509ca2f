from __future__ import annotations

import pytest
from tests.studies.planted import language_result

from longshort.studies.language import Arm, Setting, language_trial, main_trials, sweep
from longshort.studies.language_run import cost_to_reach, loss_at_flops, train_language_model
from longshort.studies.settings import LS, MHSA, paper_base, tiny
from longshort.studies.study import Trial, Workplace

SETTING = tiny(64, batch=2, steps=6)


def results_of(losses, arm=LS, setting=SETTING):
    trials = {rate: language_trial(setting, arm, rate, 0) for rate in losses}
    return {
        trial.key: {**language_result(trial, loss=2.0, max_logit=1.0), "validation_loss": losses[rate]}
        for rate, trial in trials.items()
    }


def test_a_sweep_with_the_best_inside_is_done():
    found = sweep(SETTING, LS, results_of({1e-3: 2.0, 3e-3: 1.9, 1e-2: 2.1}), seed=0)
    assert (found.is_done, found.best, found.lower, found.is_at_edge) == (True, 3e-3, 1e-3, False)


@pytest.mark.parametrize(("losses", "added"), [((2.0, 1.9, 1.8), 3e-2), ((1.8, 1.9, 2.0), 3e-4)])
def test_a_sweep_with_the_best_at_an_edge_goes_on_there(losses, added):
    found = sweep(SETTING, LS, results_of(dict(zip((1e-3, 3e-3, 1e-2), losses, strict=True))), seed=0)
    assert not found.is_done
    assert added in found.losses


def test_a_sweep_does_not_go_on_for_ever():
    found = sweep(SETTING, LS, results_of({1e-3: 2.0, 3e-3: 1.9, 1e-2: 1.8, 3e-2: 1.7, 1e-1: 1.6}), seed=0)
    assert found.is_done
    assert found.is_at_edge


def test_lost_runs_are_never_the_best():
    found = sweep(SETTING, LS, results_of({1e-3: 2.0, 3e-3: 1.9, 1e-2: None}), seed=0)
    assert found.best == 3e-3
    assert found.good_decades == pytest.approx(0.477, abs=0.001)  # 1e-3 ... 3e-3, within 0.1 nats


def test_main_trials_hold_the_sweeps_own():
    found = sweep(SETTING, LS, results_of({1e-3: 2.0, 3e-3: 1.9, 1e-2: 2.1}), seed=0)
    keys = {trial.key for trial in found.trials}
    trials = main_trials(SETTING, LS, found, range(3))
    assert len(trials) == 6
    assert sum(trial.key in keys for trial in trials) == 2


def test_loss_at_equal_flops_lies_between_measurements():
    result = {"flops_per_step": 10.0, "validation_curve": [[1, 5.0], [2, 4.0], [4, 3.0]]}
    assert [loss_at_flops(result, flops) for flops in (10, 15, 20, 30, 40)] == [5.0, 4.5, 4.0, 3.5, 3.0]
    assert loss_at_flops({**result, "validation_curve": [[1, 5.0], [2, None]]}, 15) is None


def test_cost_to_reach_a_loss():
    result = {"tokens_per_step": 10, "validation_curve": [[1, 5.0], [2, 4.0], [4, 3.0]]}
    assert [cost_to_reach(result, loss, "tokens") for loss in (5.5, 4.5, 3.5)] == [10, 15, 30]
    assert cost_to_reach(result, 2.0, "tokens") is None


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A small corpus of its own."""
    from longshort.studies.explosion import Explosion

    folder = tmp_path_factory.mktemp("studies")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text {number} says {number * 7} and ends\n" * 40)
    place = Workplace(folder, str(texts))
    Explosion().prepare(place)
    return place


def test_a_trial_is_a_pure_function_of_its_settings(workplace, tmp_path):
    trial = language_trial(SETTING, MHSA, 1e-3, seed=1)
    first = train_language_model(trial, workplace)
    again = train_language_model(trial, workplace)  # from the finished run
    (tmp_path / "data").symlink_to(workplace.folder / "data")
    elsewhere = train_language_model(trial, Workplace(tmp_path, workplace.source))
    for result in (first, again, elsewhere):
        result.pop("timing")
    assert first == again == elsewhere
    assert first["validation_curve"][-1][0] == 6
    assert first["row_range"] >= first["max_logit"] > 0


def test_arms_start_alike_and_differ(workplace):
    ls, mhsa = (train_language_model(language_trial(SETTING, arm, 1e-3, 0), workplace) for arm in (LS, MHSA))
    assert ls["loss_curve"][0][1] == pytest.approx(mhsa["loss_curve"][0][1], abs=0.02)
    assert ls["max_logit"] != mhsa["max_logit"]
    assert ls["flops_per_step"] < mhsa["flops_per_step"]


def test_a_needle_is_measured_where_it_is_asked_for(workplace):
    needle = {"lengths": [64], "depths": [0.5], "samples": 2}
    result = train_language_model(
        language_trial(SETTING, Arm("LS", measure={"needle": needle}), 1e-3, 0), workplace
    )
    assert [(cell["length"], cell["depth"]) for cell in result["needle"]] == [(64, 0.5)]


@pytest.mark.parametrize("length", [512, 8192])
def test_models_of_the_papers_size_are_built_and_stepped(workplace, length):
    """With short sequences, one layer and few steps: the code is the same."""
    setting = paper_base(length)
    model = {**setting.model, "num_hidden_layers": 1, "vocab_size": 257}
    train = {**setting.train, "sequence_length": 32, "batch_size": 2, "micro_batch_size": 1, "steps": 1}
    train |= {"warmup_steps": 0, "validation_windows": 1}
    small = Setting(model, train, "")
    trial = language_trial(small, LS, 3e-4, 0)
    assert isinstance(trial, Trial)
    assert train_language_model(trial, workplace)["loss"] > 0

from dataclasses import replace

import pytest
from tests.studies.dense_local_results import make, result, run_all

from longshort.studies.dense_local_arms import (
    EXTENSIONS,
    LOSS_FLOOR,
    equal_freedom_head_dim,
    frontier_trials,
    illustrated_pair,
    name_of,
    pairs,
    rate_of,
    sweep,
    trial_of,
)
from longshort.studies.dense_local_layer import run_layer_fit
from longshort.studies.dense_local_task import Fit, run_fit
from longshort.studies.study import SCALES

ARM = illustrated_pair("smoke").other


def swept(losses, arm=ARM):
    """A sweep's outcome if the loss at a rung is losses(rung)."""
    results = {}
    while True:
        search = sweep(arm, results)
        new = [rung for rung in search.rungs if trial_of(arm, rung, 0).key not in results]
        if not new:
            return search
        for rung in new:
            results[trial_of(arm, rung, 0).key] = result(arm, losses(rung), 1.0)


def test_rates_are_half_powers_of_ten():
    assert [rate_of(rung) for rung in (-3, -2, -1, 4)] == [0.0316, 0.1, 0.316, 100.0]


@pytest.mark.parametrize("best", [-6, -4, -2, 0, 2])
def test_a_sweep_goes_on_until_its_best_rate_is_inside(best):
    search = swept(lambda rung: 1.0 + abs(rung - best))
    assert search.best == best and not search.is_at_edge
    assert search.rungs[0] < best < search.rungs[-1]


def test_a_sweep_that_ends_at_an_edge_says_so():
    search = swept(lambda rung: 10.0 - rung)
    assert len(search.rungs) == 3 + EXTENSIONS
    assert search.best == search.rungs[-1] and search.is_at_edge


def test_of_losses_below_the_floor_the_lowest_rate_is_best():
    assert swept(lambda rung: LOSS_FLOOR / 1000 * 2.0**-rung if rung > -5 else 1.0).best == -4


def test_rates_that_diverge_are_not_best():
    assert swept(lambda rung: None if rung > -4 else 1.0 - rung).best == -4
    assert swept(lambda _rung: None).is_at_edge


def test_a_sweep_waits_for_all_its_rungs():
    assert sweep(ARM, {}).best is None
    known = {trial_of(ARM, rung, 0).key: result(ARM, 1.0, 1.0) for rung in sweep(ARM, {}).rungs[:2]}
    assert sweep(ARM, known) == sweep(ARM, {})


@pytest.mark.parametrize("scale", SCALES)
def test_the_grid_is_whole_and_arms_of_a_pair_differ_in_their_window_alone(scale):
    grid = [pair for pair in pairs(scale) if pair.topic == "grid"]
    fits = [pair.local for pair in grid]
    ratios = {(fit.span / fit.head_dim, (fit.window or 0) / fit.span) for fit in fits}
    assert ratios == {(a, b) for a in (0.5, 1, 4) for b in (0.5, 1, 2, 4)}
    for pair in pairs(scale):
        if pair.other_name == "global":
            assert pair.other == replace(pair.local, window=None)
    controls = [pair.other for pair in pairs(scale) if pair.topic == "control"]
    assert [fit.alibi_slope > 0 for fit in controls] == [True, False, False]
    assert controls[1].head_dim > controls[0].head_dim and controls[2].start_window


@pytest.mark.parametrize("scale", SCALES)
def test_names_tell_arms_apart(scale):
    arms = {arm for pair in pairs(scale) for arm in (pair.local, pair.other)}
    arms |= {replace(Fit(**trial.settings), learning_rate=1.0) for trial in frontier_trials(scale, 0)}
    assert len({name_of(arm) for arm in arms}) == len(arms)


@pytest.mark.parametrize("scale", ["laptop", "overnight", "paper"])
def test_windows_of_the_grid_are_narrower_than_the_text(scale):
    grid = [pair.local for pair in pairs(scale) if pair.topic == "grid"]
    assert all(fit.window is not None and fit.window < fit.length for fit in grid)


def test_equal_freedom_counts_parameters_per_score():
    local = Fit(length=4, head_dim=7, span=2, window=2, learning_rate=1.0, steps=1, seed=0)
    assert equal_freedom_head_dim(local) == 10  # 7 scores with 7 each, 10 scores


def test_trials_of_an_arm_differ_in_rate_and_seed_alone():
    first, second = trial_of(ARM, -2, 0), trial_of(ARM, -1, 1)
    assert first.arm == second.arm and first.key != second.key
    differing = {name for name, value in first.settings.items() if value != second.settings[name]}
    assert differing == {"learning_rate", "seed"}
    assert second.seed == second.settings["seed"] == 1


@pytest.mark.parametrize("topic", ["control", "precision", "layer"])
def test_trials_of_the_paper_scale_can_be_stepped(topic):
    pair = next(pair for pair in pairs("paper") if pair.topic == topic)
    fit = replace(Fit(**trial_of(pair.other, -4, 0).settings), steps=1)
    run = run_layer_fit if topic == "layer" else run_fit
    found = run(fit, "cpu")
    assert found["loss"] > 0 and len(found["losses"]) == 2


def test_planted_results_find_the_planted_rate():
    results = run_all(make(lambda _fit: 1.0, best_rung=-3), seeds=2)
    assert sweep(ARM, results).best == -3

"""Rankings of heads on planted losses, where they are known to find the best layout or to miss it."""

from __future__ import annotations

import json
from itertools import combinations, pairwise

import pytest
from tests.studies.in_process import run_here
from tests.studies.planted import fill, judge, noise, outcomes

from longshort.studies import catalogue
from longshort.studies.allocation import (
    GREEDY,
    ONE_AT_A_TIME,
    REPAIR,
    Allocation,
    greedy_layouts,
    mean_regret,
    one_at_a_time_layouts,
    optimal_layouts,
    rank_correlation,
    regrets,
    sampled_layouts,
    windows_of,
)
from longshort.studies.catalogue import StudySettings, run_studies
from longshort.studies.framework.store import ResultsFile
from longshort.studies.framework.study import Workplace
from longshort.studies.progress.study import Progress

STUDY = Allocation()
NOT_SHOWN, SHOWN, AGAINST, OPEN = (
    "not shown at this scale", "shown", "contradicted at this scale", "open: not reached",
)  # fmt: skip
HEADS = 8


def losses_of(loss, heads=HEADS):
    """Losses of all layouts, from a function of the set of global heads."""
    sets = [{head for head in range(heads) if layout >> head & 1} for layout in range(1 << heads)]
    return [loss(some) for some in sets]


def additive(some):
    """Each head is worth the more, the higher its number, whatever the others are."""
    return 1.5 - sum(0.01 * (head + 1) for head in some)


def redundant(some):
    """Heads 0 and 1 do the same work, the most important of all; the others do what they do alone."""
    return additive(some - {0, 1}) + (0.0 if some & {0, 1} else 0.5)


def trap(some):
    """With all heads but one, losing head 7 costs nothing; with fewer, only head 7 matters."""
    return (
        1.5 - (0.4 if 7 in some else 0.4 if len(some) >= 4 else 0.0) - 0.01 * len(some) + 0.001 * (7 in some)
    )


def test_where_heads_add_up_both_rankings_are_optimal():
    losses = losses_of(additive)
    best = optimal_layouts(losses)
    assert best == [sum(1 << head for head in range(HEADS - count, HEADS)) for count in range(HEADS + 1)]
    assert one_at_a_time_layouts(losses) == greedy_layouts(losses) == best
    assert mean_regret(losses, best) == 0.0


def test_the_optimum_is_that_of_all_sets():
    losses = losses_of(lambda some: (sum(7 * head * head + 3 * head for head in some) * 31 % 101) / 101)
    for count, layout in enumerate(optimal_layouts(losses)):
        sums = [sum(1 << head for head in some) for some in combinations(range(HEADS), count)]
        assert losses[layout] == min(losses[one] for one in sums) and layout in sums


def test_heads_that_do_the_same_mislead_one_at_a_time_but_not_greedy():
    losses = losses_of(redundant)
    assert mean_regret(losses, greedy_layouts(losses)) == pytest.approx(0.0, abs=1e-9)
    # Alone, heads 0 and 1 cost nothing, so both go first: all smaller layouts lack their work.
    found = regrets(losses, one_at_a_time_layouts(losses))
    assert found[7] == found[8] == 0.0
    assert min(found[1:7]) > 0.4


def test_a_head_that_matters_late_misleads_greedy():
    losses = losses_of(trap)
    assert greedy_layouts(losses)[7] == 0b0111_1111  # head 7 costs least while there are many others
    found = regrets(losses, greedy_layouts(losses))
    assert found[1] == found[2] == found[3] == pytest.approx(0.399)
    assert mean_regret(losses, greedy_layouts(losses)) > 0.1


def test_every_choice_has_as_many_global_heads_as_asked_for():
    losses = losses_of(trap)
    for choose in (optimal_layouts, one_at_a_time_layouts, greedy_layouts):
        assert [layout.bit_count() for layout in choose(losses)] == list(range(HEADS + 1))
    layouts = greedy_layouts(losses)
    assert all(small & ~large == 0 for small, large in pairwise(layouts))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sample_begins_with_the_choices_and_has_no_layout_twice(count):
    losses = losses_of(trap)
    sample = sampled_layouts(losses, count, 6, seed=0)
    assert len(set(sample)) == len(sample) == 6
    assert {layout.bit_count() for layout in sample} == {count}
    assert sample[0] == optimal_layouts(losses)[count]
    assert {one_at_a_time_layouts(losses)[count], greedy_layouts(losses)[count]} <= set(sample[:3])
    assert sample == sampled_layouts(losses, count, 6, seed=0)
    others = {tuple(sampled_layouts(losses, count, 6, seed)) for seed in range(4)}
    assert len(others) > 1


def test_rank_correlation():
    assert rank_correlation([1.0, 2.0, 3.0], [5.0, 6.0, 60.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
    assert rank_correlation([1.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(3**0.5 / 2)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) is None


def test_heads_are_counted_layer_by_layer():
    config = STUDY.scales["laptop"].config
    assert windows_of(0b0010_0001, config, 16) == [[None, 16, 16, 16], [16, None, 16, 16]]
    assert windows_of(0b1111_1111, config, 16) == [[None] * 4] * 2


def planted(loss, after=lambda before, trial: before - 0.1, full=None):
    """Results in which the layouts of a model have the losses of a function, and repair changes them."""

    def losses(seed):
        found = [value + 0.0005 * seed for value in losses_of(loss)]
        return found if full is None else [*found[:-1], full]

    def result_of(trial):
        if "start" not in trial.settings:
            return {"losses": losses(trial.seed), "tokens": 1}
        windows = [window for layer in trial.settings["model"]["layouts"] for window in layer]
        layout = sum(1 << head for head, window in enumerate(windows) if window is None)
        return {"validation_loss": after(losses(trial.seed)[layout], trial)}

    return result_of


@pytest.mark.parametrize(
    ("loss", "one_at_a_time", "greedy"),
    [(additive, SHOWN, SHOWN), (redundant, AGAINST, SHOWN), (trap, AGAINST, AGAINST)],
)
def test_verdicts_on_rankings(tmp_path, loss, one_at_a_time, greedy):
    found = judge(STUDY, "laptop", planted(loss), tmp_path)
    assert found == {ONE_AT_A_TIME.id: one_at_a_time, GREEDY.id: greedy, REPAIR.id: SHOWN}


@pytest.mark.parametrize(
    ("after", "outcome"),
    [
        (lambda before, trial: 0.5 * before, SHOWN),
        (lambda before, trial: -before, AGAINST),
        (lambda before, trial: noise(trial), AGAINST),  # no order at all
        (lambda before, trial: before if trial.seed else -before, NOT_SHOWN),
        (lambda before, trial: None, NOT_SHOWN),
    ],
)
def test_verdicts_on_repair(tmp_path, after, outcome):
    assert judge(STUDY, "laptop", planted(additive, after), tmp_path)[REPAIR.id] == outcome


@pytest.mark.parametrize("full", [2.5, None])
def test_a_model_that_has_not_learned_leaves_all_open(tmp_path, full):
    def result_of(trial):
        result = planted(additive)(trial)
        if "losses" in result and trial.seed == 1:
            result["losses"][-1] = full
        return result

    assert set(judge(STUDY, "laptop", result_of, tmp_path).values()) == {OPEN}


def test_repairs_are_planned_once_the_layouts_are_known(tmp_path):
    first = STUDY.plan("overnight", range(3), {})
    assert len(first.trials) == 3 and first.later_work > 0
    assert [trial.key for trial in first.trials] != [
        trial.key for trial in Progress().plan("overnight", range(3), {}).trials[:3]
    ]
    results = {trial.key: planted(additive)(trial) for trial in first.trials[:2]}
    half = STUDY.plan("overnight", range(3), results)
    assert len(half.trials) == 3 + 2 * 3 * 6 and 0 < half.later_work < first.later_work
    whole = fill(STUDY, "overnight", range(3), planted(additive))
    assert STUDY.plan("overnight", range(3), whole).later_work == 0
    part = {key: result for key, result in whole.items() if "losses" in result}
    found = outcomes(STUDY.findings("overnight", range(3), part, tmp_path))
    assert found == {
        ONE_AT_A_TIME.id: SHOWN, GREEDY.id: SHOWN, REPAIR.id: "not measured at this scale",
    }  # fmt: skip
    assert set(outcomes(STUDY.findings("overnight", range(3), {}, tmp_path)).values()) == {
        "not measured at this scale"
    }


@pytest.mark.parametrize("scale", STUDY.scales)
def test_the_trained_models_are_those_of_the_study_progress(scale):
    trials = Progress().plan(scale, range(2), {}).trials
    theirs = [
        {name: trial.settings[name] for name in ("model", "train")} for trial in trials if trial.arm == "MHSA"
    ]
    for seed in range(2):
        settings = STUDY.scales[scale].trained(seed).settings
        assert {name: settings[name] for name in ("model", "train")} in theirs


def test_the_repairs_of_a_seed_see_the_same_batches_which_the_model_has_not_seen():
    scale = STUDY.scales["overnight"]
    first, second = (scale.repair(layout, 1).settings for layout in (3, 5))
    assert first["train"] == second["train"] and first["model"] != second["model"]
    assert first["start"] == {name: scale.trained(1).settings[name] for name in ("model", "train")}
    assert first["train"]["seed"] != first["start"]["train"]["seed"]
    assert first["train"]["learning_rate"] == first["start"]["train"]["learning_rate"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The study at the scale smoke, on a small corpus."""
    folder = tmp_path_factory.mktemp("allocation")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"text {number} says {number * 7} and ends\n" * 60)
    settings = StudySettings(
        "allocation", scale="smoke", source=str(folder / "texts"), out=folder / "out", jobs=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "run_trials", run_here)
        run_studies(settings)
    return settings


def test_every_layout_is_measured_and_the_sample_repaired(smoke):
    results = ResultsFile(smoke.folder / "allocation").results
    seeds = range(2)
    trials = STUDY.plan("smoke", seeds, results).trials
    assert results.keys() == {trial.key for trial in trials} and len(trials) == 2 + 2 * 3
    losses = [results[STUDY.scales["smoke"].trained(seed).key]["losses"] for seed in seeds]
    assert all(len(found) == 256 and len(set(found)) > 200 for found in losses)
    findings = json.loads((smoke.folder / "allocation" / "findings.json").read_text())
    assert set(findings["prediction_intervals"]) >= {"one head at a time", "greedy"}
    assert (smoke.folder / "runs").is_dir()


def test_the_loss_of_a_layout_is_that_from_which_its_repair_begins(smoke):
    """With hardly any learning rate, repair gives back the loss that was measured, for any layout."""
    scale = STUDY.scales["smoke"]
    losses = ResultsFile(smoke.folder / "allocation").results[scale.trained(0).key]["losses"]
    place = Workplace(smoke.folder, smoke.source)
    for layout in (0b1111_1111, 0b0001_0010, 0):
        trial = scale.repair(layout, 0)
        settings = {**trial.settings, "train": {**trial.settings["train"], "learning_rate": 1e-9}}
        still = type(trial)("still", 0, settings)
        assert STUDY.run(still, place)["validation_loss"] == pytest.approx(losses[layout], abs=1e-5)
    assert abs(losses[0b0001_0010] - losses[0]) > 1e-4

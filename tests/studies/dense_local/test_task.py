import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.autograd import gradcheck

from longshort.studies.dense_local.task import (
    HIDDEN_PROBABILITY,
    Fit,
    Loss,
    PlateauWatch,
    curve_steps,
    least_loss,
    make_target,
    run_fit,
    scores_of,
    visible_pairs,
    windows_of_grid,
)

SMALL = Fit(length=24, head_dim=4, span=4, window=None, learning_rate=0.1, steps=40, seed=0)


def target_of(fit):
    return make_target(fit, torch.Generator().manual_seed(fit.seed))


def divergence(target, scores, visible):
    """The definition, row by row; a hidden key counts with HIDDEN_PROBABILITY."""
    total = 0.0
    for i in range(len(target)):
        keys = visible[i].nonzero()[:, 0]
        probabilities = dict(zip(keys.tolist(), scores[i, keys].softmax(0).tolist(), strict=True))
        for j, wanted in enumerate(target[i].tolist()):
            if wanted:
                total += wanted * math.log(wanted / probabilities.get(j, HIDDEN_PROBABILITY))
    return total / len(target)


def test_the_target_is_a_band_of_rows_that_sum_to_one():
    target = target_of(SMALL)
    torch.testing.assert_close(target.sum(-1), torch.ones(24, dtype=torch.float64))
    assert torch.equal(target > 0, visible_pairs(24, SMALL.span))


def test_the_target_spreads_with_sigma():
    assert target_of(replace(SMALL, sigma=0.0))[10, 7:11].tolist() == pytest.approx([0.25] * 4)
    assert target_of(replace(SMALL, sigma=4.0)).amax(-1).mean() > target_of(SMALL).amax(-1).mean()


def test_without_a_band_the_same_values_lie_anywhere_in_the_past():
    scattered, banded = target_of(replace(SMALL, has_band=False)), target_of(SMALL)
    assert not (scattered > 0)[~visible_pairs(24, None)].any()
    assert (scattered > 0)[~visible_pairs(24, SMALL.span)].any()
    torch.testing.assert_close(scattered.sort(-1).values, banded.sort(-1).values)


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_the_loss_is_the_divergence(window):
    target, visible = target_of(SMALL), visible_pairs(24, window)
    scores = torch.randn(24, 24, dtype=torch.float64)
    assert Loss(target, visible, 0.0, torch.float64)(scores).item() == pytest.approx(
        divergence(target, scores, visible), rel=1e-10
    )


def test_alibi_lowers_far_scores():
    target, visible = target_of(SMALL), visible_pairs(24, None)
    positions = torch.arange(24.0, dtype=torch.float64)
    scores = torch.randn(24, 24, dtype=torch.float64)
    biased = scores - 0.5 * (positions[:, None] - positions).abs()
    assert Loss(target, visible, 0.5, torch.float64)(scores).item() == pytest.approx(
        divergence(target, biased, visible), rel=1e-10
    )


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_gradients(window, slope):
    fit = replace(SMALL, length=7, head_dim=3, span=3)
    loss = Loss(target_of(fit), visible_pairs(7, window), slope, torch.float64)
    parameters = [torch.randn(7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(lambda q, k: loss(scores_of(q, k)), parameters)


def test_rounded_exponentials_change_the_loss_a_little_and_keep_its_gradient():
    target, visible = target_of(SMALL), visible_pairs(24, None)
    scores = torch.randn(24, 24, requires_grad=True)
    loss = Loss(target, visible, 0.0, torch.float32)
    exact, rounded = loss(scores), loss.with_rounded_exponentials(scores)
    assert exact.item() != rounded.item()
    assert rounded.item() == pytest.approx(exact.item(), abs=2**-8)
    gradients = [torch.autograd.grad(value, scores)[0] for value in (exact, rounded)]
    torch.testing.assert_close(gradients[1], gradients[0], atol=2**-8 / 24, rtol=2**-6)


def test_rounded_exponentials_stay_finite_where_they_underflow():
    target, visible = target_of(SMALL), visible_pairs(24, None)
    scores = (1000.0 * torch.randn(24, 24)).requires_grad_()
    loss = Loss(target, visible, 0.0, torch.float32).with_rounded_exponentials(scores)
    loss.backward()
    assert loss.isfinite() and scores.grad is not None and scores.grad.isfinite().all()


@pytest.mark.parametrize("window", [None, 4, 2, 1])
def test_the_least_loss_of_a_window_is_reached_by_the_targets_own_values_and_by_nothing_better(window):
    target, visible = target_of(SMALL), visible_pairs(24, window)
    loss = Loss(target, visible, 0.0, torch.float64)
    least = least_loss(target, visible)
    scores = target.clamp_min(1e-30).log()
    assert loss(scores).item() == pytest.approx(least, abs=1e-12)
    assert (least > 1) == (window in (1, 2))
    for _ in range(20):
        nearby = loss(scores + 0.1 * torch.randn(24, 24, dtype=torch.float64)).item()
        assert nearby == pytest.approx(least) if window == 1 else nearby > least


def test_all_arms_of_a_seed_start_from_the_same_parameters_and_target():
    one_step = replace(SMALL, steps=1, learning_rate=1e-9, crop=8)
    results = [run_fit(replace(one_step, window=window), "cpu") for window in (None, 4)]
    assert results[0]["target"] == results[1]["target"]
    inside = [dict(result["max_logit_in_band"])[2] for result in results]
    assert inside[0] == inside[1]


def test_a_fit_depends_on_its_settings_alone():
    first = run_fit(SMALL, "cpu")
    torch.manual_seed(1)
    assert run_fit(Fit(**json.loads(json.dumps(asdict(SMALL)))), "cpu") == first
    assert run_fit(replace(SMALL, seed=1), "cpu")["loss"] != first["loss"]


def test_local_attention_that_has_as_many_parameters_as_scores_wins():
    fit = replace(SMALL, length=48, steps=200)
    whole, local = (run_fit(replace(fit, window=window), "cpu") for window in (None, 4))
    assert local["loss"] < whole["loss"] / 10
    assert local["max_logit"] < whole["max_logit"] / 2


def test_a_window_that_is_too_narrow_keeps_a_loss():
    narrow = run_fit(replace(SMALL, window=2, steps=200), "cpu")
    assert narrow["least_loss"] > 1
    assert narrow["loss"] == pytest.approx(narrow["least_loss"], rel=1e-3)


def test_curves_end_with_the_result_and_results_are_json():
    result = run_fit(SMALL, "cpu")
    assert result["steps"] == curve_steps(40) and result["steps"][0] == 0 and result["steps"][-1] == 40
    assert (result["losses"][-1], result["max_logits"][-1]) == (result["loss"], result["max_logit"])
    assert result["max_logit"] <= result["row_range"] <= 2 * result["max_logit"]
    assert [window for window, _ in result["max_logit_in_band"]] == windows_of_grid(4) == [2, 4, 8, 16]
    json.dumps(result, allow_nan=False)


def test_a_fit_that_diverges_says_none():
    result = run_fit(replace(SMALL, optimizer="sgd", learning_rate=1e30), "cpu")
    assert result["loss"] is None and result["losses"][-1] is None and result["losses"][0] is not None
    json.dumps(result, allow_nan=False)


def test_a_start_from_another_window_goes_on_where_that_fit_ended():
    local = run_fit(replace(SMALL, window=4), "cpu")
    result = run_fit(replace(SMALL, start_window=4), "cpu")
    assert result["start"] == {"loss": local["loss"], "max_logit": local["max_logit"]}
    assert result["losses"][0] > 10 * local["loss"]
    assert dict(result["max_logit_in_band"])[4] > 0 and result["loss"] < result["losses"][0]


def test_a_limit_is_kept():
    free = run_fit(replace(SMALL, steps=200), "cpu")
    held = run_fit(replace(SMALL, steps=200, logit_limit=3.0), "cpu")
    assert free["max_logit"] > 3 >= held["max_logit"]
    assert held["loss"] > free["loss"]


def test_precisions_differ():
    fits = [replace(SMALL, precision=name) for name in ("fp32", "bf16", "bf16-flash")]
    assert len({run_fit(fit, "cpu")["loss"] for fit in fits}) == 3


def test_crops_are_the_last_rows_and_columns():
    result = run_fit(replace(SMALL, crop=6), "cpu")
    torch.testing.assert_close(
        torch.tensor(result["target"], dtype=torch.float64), target_of(SMALL)[-6:, -6:], rtol=1e-3, atol=0
    )
    assert len(result["fit"]) == 6 and sum(result["fit"][-1]) == pytest.approx(1, abs=0.1)


def test_progress_is_told():
    shares = []
    run_fit(replace(SMALL, start_window=4), "cpu", shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length must be an integer >= 1"),
        ({"window": 0}, "window must be an integer >= 1"),
        ({"span": 25}, r"span must be at most length \(24\), got 25"),
        ({"crop": 25}, r"crop must be at most length \(24\), got 25"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"logit_limit": -1.0}, "logit_limit must be a number > 0"),
        ({"sigma": -1.0}, "sigma must be a number >= 0"),
        ({"form": "conv"}, "form must be one of .*, got 'conv'"),
        ({"optimizer": "lion"}, "optimizer must be one of .*, got 'lion'"),
        ({"precision": "fp8"}, "precision must be one of .*, got 'fp8'"),
        ({"form": "rotary", "crop": 4}, "form must be 'free' with .*, got 'rotary'"),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def watch(losses):
    """The first step at which a plateau is seen; None: at none."""
    seen = PlateauWatch()
    return next((step for step, loss in enumerate(losses, start=1) if seen.add(loss)), None)


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ([1.0] * 400, 300),
        ([1.0] * 299, None),
        ([step**-0.08 for step in range(1, 3000)], 300),
        ([step**-0.2 for step in range(1, 3000)], None),  # as long as it falls at this pace
        ([math.exp(-step / 50) for step in range(3000)], 2300),
        ([math.nan] * 900, None),
        ([1.0] * 100 + [math.inf] + [1.0] * 900, 400),
        ([0.0] * 300, 300),
    ],
    ids=["flat", "too short", "slow", "falling", "to the floor", "not finite", "a spike", "zero"],
)
def test_a_plateau_is_where_the_loss_no_longer_falls(losses, reached):
    assert watch(losses) == reached


def test_a_plateau_ends_the_constant_rate():
    fit = replace(SMALL, steps=2000, to_plateau=True, decay_steps=50, window=4)
    found = run_fit(fit, "cpu")
    assert 300 <= found["plateau_at"] < 2000
    assert found["steps"][-1] == found["plateau_at"] + 50
    assert len(found["steps"]) == len(found["losses"]) == len(found["max_logits"])
    assert found["losses"][-1] == found["loss"]
    constant = run_fit(replace(SMALL, steps=found["plateau_at"] + 50, window=4), "cpu")
    before, after = (dict(zip(run["steps"], run["losses"], strict=True)) for run in (found, constant))
    shared = [step for step in before.keys() & after.keys() if step <= found["plateau_at"]]
    assert len(shared) > 10 and all(before[step] == after[step] for step in shared)
    assert found["loss"] != constant["loss"]


def test_a_fit_without_a_plateau_says_so():
    found = run_fit(replace(SMALL, learning_rate=1e-4, steps=250, to_plateau=True, decay_steps=10), "cpu")
    assert found["plateau_at"] is None and found["steps"][-1] == 260
    assert "plateau_at" not in run_fit(SMALL, "cpu")


def test_the_rate_falls_to_zero():
    """With a rate so high that it decides where the fit stands, the last steps hardly move."""
    fit = replace(SMALL, steps=100, decay_steps=100)
    found = run_fit(fit, "cpu")
    assert found["steps"][-1] == 200
    assert found["loss"] < run_fit(replace(SMALL, steps=100), "cpu")["loss"]

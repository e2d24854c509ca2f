import json
from dataclasses import replace

import pytest
import torch

from longshort.studies.dense_local.layer import TokenLayer, TokenTask, relative_error, run_layer_fit
from longshort.studies.dense_local.task import Fit

SMALL = Fit(length=16, head_dim=4, span=4, window=None, learning_rate=0.01, steps=20, seed=0, form="learned")


def model_and_task(fit):
    generator = torch.Generator().manual_seed(fit.seed)
    task = TokenTask(fit, generator, "cpu")
    return TokenLayer(fit, task, generator), task


def test_what_is_wanted_depends_on_the_last_tokens_alone():
    task = model_and_task(SMALL)[1]
    tokens = task.draw(1, torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % task.vocabulary
    differs = (task.wanted(tokens) != task.wanted(changed)).any(-1)[0]
    assert differs.nonzero()[:, 0].tolist() == [5, 6, 7, 8]


def test_wanted_outputs_are_within_the_rank_of_a_head():
    task = model_and_task(SMALL)[1]
    wanted = task.wanted(task.draw(4, torch.Generator().manual_seed(1))).flatten(0, 1)
    assert torch.linalg.matrix_rank(wanted, rtol=1e-4) == SMALL.head_dim


@pytest.mark.parametrize("form", ["learned", "rotary", "none"])
def test_weights_of_a_seed_are_alike_for_all_windows(form):
    fit = replace(SMALL, form=form)
    states = [model_and_task(replace(fit, window=window))[0].state_dict() for window in (None, 4)]
    assert ("embed_positions.weight" in states[0]) == (form == "learned")
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name])


@pytest.mark.parametrize(("form", "moves"), [("learned", True), ("rotary", True), ("none", False)])
def test_only_positions_tell_the_order_of_what_is_visible(form, moves):
    model, task = model_and_task(replace(SMALL, form=form))
    tokens = task.draw(1, torch.Generator().manual_seed(1))
    swapped = tokens.clone()
    swapped[0, [2, 9]] = tokens[0, [9, 2]]
    assert tokens[0, 2] != tokens[0, 9]
    last, other = (model(which)[0, -1] for which in (tokens, swapped))
    assert torch.allclose(last, other, atol=1e-5) != moves


def test_the_error_is_one_for_zeros():
    wanted = torch.randn(2, 3, 4)
    assert relative_error(torch.zeros_like(wanted), wanted) == 1
    assert relative_error(wanted, wanted) == 0


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-flash"])
def test_it_learns(window, precision):
    result = run_layer_fit(replace(SMALL, window=window, precision=precision), "cpu")
    assert result["loss"] < result["losses"][0]
    assert (result["losses"][-1], result["max_logits"][-1]) == (result["loss"], result["max_logit"])
    assert 0 < result["row_range"] <= 2 * result["max_logit"]
    if window is None:
        [[span, in_band]] = result["max_logit_in_band"]
        assert span == 4 and 0 < in_band <= result["max_logit"]
    else:
        assert result["max_logit_in_band"] == []
    json.dumps(result, allow_nan=False)


def test_it_depends_on_its_settings_alone():
    first = run_layer_fit(SMALL, "cpu")
    torch.manual_seed(1)
    assert run_layer_fit(SMALL, "cpu") == first


def test_a_fit_that_diverges_says_none():
    result = run_layer_fit(replace(SMALL, optimizer="sgd", learning_rate=1e30), "cpu")
    assert result["loss"] is None
    json.dumps(result, allow_nan=False)

from __future__ import annotations

import math

import pytest
from tests.studies.planted import judge, language_result, noise, swept

from longshort.reporting.intervals import Interval
from longshort.studies.framework.study import Outcome
from longshort.studies.remedies import FIGURE_5, Remedies, figure_5_outcome

STUDY = Remedies()


def planted(losses):
    def result_of(trial):
        if "pieces" in trial.settings:
            return {"bytes_per_piece": 4.0, "pieces": 10_000}
        loss = losses(trial.arm) + swept(trial) + 0.005 * noise(trial)
        return language_result(trial, loss=loss, max_logit=30.0)

    return result_of


def test_equal_remedies_show_nothing(tmp_path):
    assert judge(STUDY, "laptop", planted(lambda arm: 2.0), tmp_path) == {
        FIGURE_5.id: "not shown at this scale"
    }


def test_a_planted_gain_is_at_best_partly_shown(tmp_path):
    """exp(-0.5 · 4 bytes) is below 1/2; the curves fall by 2 nats, so LS reaches 4.0 in its first tenth."""
    losses = {"LS": 2.0, "MHSA": 3.0, "MHSA, fp32": 2.5, "MHSA + QK-norm": 3.95}
    assert judge(STUDY, "laptop", planted(losses.__getitem__), tmp_path) == {FIGURE_5.id: "partly shown"}


def test_a_worse_ls_is_contradicted(tmp_path):
    losses = {"LS": 2.5, "MHSA": 2.0, "MHSA, fp32": 2.0, "MHSA + QK-norm": 2.0}
    assert judge(STUDY, "laptop", planted(losses.__getitem__), tmp_path) == {
        FIGURE_5.id: "contradicted at this scale"
    }


def test_every_arm_of_every_scale_is_drawn(tmp_path):
    judge(STUDY, "smoke", planted(lambda arm: 2.0), tmp_path)
    assert (tmp_path / "rates.png").is_file()


def interval(low, high):
    return Interval(math.sqrt(low * high), low, high, 3)


@pytest.mark.parametrize(
    ("perplexity", "cost", "outcome"),
    [
        (((0.3, 0.4), (0.9, 1.1)), ((0.5, 0.9), (0.04, 0.06)), Outcome.PARTLY),
        (((0.9, 1.1), (0.3, 0.4)), ((0.04, 0.06), (0.5, 0.9)), Outcome.PARTLY),
        (((0.3, 0.4), (0.9, 1.1)), ((0.04, 0.06), (0.5, 0.9)), Outcome.NOT_SHOWN),
        (((0.3, 0.6), (0.9, 1.1)), ((0.5, 0.9), (0.04, 0.06)), Outcome.NOT_SHOWN),
        (((1.1, 1.6), (1.2, 1.3)), ((2.0, 9.0), (2.0, 4.0)), Outcome.CONTRADICTED),
    ],
)
def test_the_rule_asks_for_both_ratios_of_unlike_remedies(perplexity, cost, outcome):
    ratios = [[interval(*ends) for ends in pair] for pair in (perplexity, cost)]
    assert figure_5_outcome(*ratios) is outcome


@pytest.mark.parametrize("is_timed", [True, False])
def test_loss_by_time_is_drawn_where_all_arms_were_timed(tmp_path, monkeypatch, is_timed):
    from longshort.studies import remedies

    titles = []
    draw = remedies.draw_curves

    def keep(panels, file):
        titles.extend(panel.title for panel in panels)
        return draw(panels, file)

    def result_of(trial):
        result = planted(lambda arm: 2.0)(trial)
        return result if is_timed or trial.arm != "LS" else {**result, "timing": {}}

    monkeypatch.setattr(remedies, "draw_curves", keep)
    judge(STUDY, "laptop", result_of, tmp_path)
    assert ("By time on this machine" in titles) == is_timed

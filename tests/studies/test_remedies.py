from __future__ import annotations

import math

import pytest
from tests.studies.planted import fill, findings_of, judge, language_result, swept, table_of

from longshort.studies import remedies
from longshort.studies.remedies import Remedies

STUDY = Remedies()


def planted(losses):
    def result_of(trial):
        if "pieces" in trial.settings:
            return {"bytes_per_piece": 4.0, "pieces": 10_000}
        return language_result(trial, loss=losses.get(trial.arm, 2.0) + swept(trial), max_logit=30.0)

    return result_of


def costs(losses, folder):
    findings = findings_of(STUDY, "smoke", range(2), fill(STUDY, "smoke", range(2), planted(losses)), folder)
    assert not findings.verdicts
    return {name: cells for name, *cells in table_of(findings, "Perplexity and cost").rows}


def test_perplexity_and_cost_of_ls_are_relative_to_each_remedy(tmp_path):
    """The curves fall by 2 nats in 12 steps: LS has the final loss of fp32 after 9 of them."""
    rows = costs({"LS": 2.0, "MHSA, fp32": 2.5}, tmp_path)
    perplexity, tokens, flops, hours, *_ = [float(cell.split()[0]) for cell in rows["MHSA, fp32"]]
    assert perplexity == pytest.approx(math.exp(-0.5 * 4.0), rel=0.01)
    assert tokens == pytest.approx(0.75)
    assert flops < tokens  # a step of LS is cheaper
    assert hours == pytest.approx(flops * 19.5 / 312, rel=0.01)
    assert rows["LS"][:4] == ["1"] * 4


def test_a_loss_that_ls_does_not_reach_has_no_cost(tmp_path):
    rows = costs({"LS": 2.5}, tmp_path)
    assert rows["MHSA + QK-norm"][1:4] == ["not reached"] * 3


def test_every_arm_of_every_scale_is_drawn(tmp_path):
    assert judge(STUDY, "smoke", planted({}), tmp_path) == {}
    assert (tmp_path / "rates.png").is_file()


@pytest.mark.parametrize("is_timed", [True, False])
def test_loss_by_time_is_drawn_where_all_arms_were_timed(tmp_path, monkeypatch, is_timed):
    titles = []
    draw = remedies.draw_curves

    def keep(panels, file):
        titles.extend(panel.title for panel in panels)
        return draw(panels, file)

    def result_of(trial):
        result = planted({})(trial)
        return result if is_timed or trial.arm != "LS" else {**result, "timing": {}}

    monkeypatch.setattr(remedies, "draw_curves", keep)
    judge(STUDY, "smoke", result_of, tmp_path)
    assert ("By time on this machine" in titles) == is_timed

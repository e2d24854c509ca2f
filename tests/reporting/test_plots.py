from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.image import imread

from longshort.reporting.intervals import Interval
from longshort.reporting.plots import Panel, draw_curves, draw_intervals, draw_points
from longshort.reporting.style import new_figure, scale_logarithmically


def is_drawn(file):
    """Whether a picture shows more than its paper."""
    return float(np.std(imread(file)[..., :3])) > 0.01


CURVES = {"MHSA": [[(1, 3.0), (2, 2.0)], [(1, 3.1), (2, None)]], "LS": [[(1, 2.5), (2, 1.5)]]}


@pytest.mark.parametrize("curves", [CURVES, {"LS": [[]]}, {"LS": [[(1, None), (2, None)]]}])
def test_curves_with_values_that_were_lost(tmp_path, curves):
    panels = [Panel("Loss", "step", "nats", curves), Panel("Again", "step", "nats", curves)]
    assert is_drawn(draw_curves(panels, tmp_path / "curves.png"))


@pytest.mark.parametrize("log", [False, True])
def test_intervals_that_are_not_known(tmp_path, log):
    rows = [
        ("known", Interval(0.5, 0.4, 0.6, 3)),
        ("open", Interval(0.5, -math.inf, math.inf, 1)),
        ("lost", Interval(math.nan, -math.inf, math.inf, 2)),
    ]
    for shown in (rows, rows[2:]):
        file = draw_intervals(
            shown, tmp_path / "rows.png", "Title", "ratio", references={1.0: "one"}, log=log
        )
        assert is_drawn(file)


@pytest.mark.parametrize("base", [0, 2, 10])
def test_points_along_lengths_rates_and_depths(tmp_path, base):
    points = [(0.1, Interval(1.0, 0.9, 1.1, 3)), (1.0, Interval(math.nan, -math.inf, math.inf, 3))]
    panels = {"One": {"LS": points}, "Two": {"LS": points, "MHSA": points[:1]}}
    file = draw_points(panels, tmp_path / "points.png", "x", ("a", "b"), log_x_base=base)
    assert is_drawn(file)


@pytest.mark.parametrize(
    "points", [[], [(8, Interval(-1.0, -math.inf, math.inf, 1))], [(8, Interval(2.0, 1.0, 3.0, 3))]]
)
def test_panels_may_share_their_y_axis_and_differ_in_x(tmp_path, points):
    panels = {"Length": {"LS": points, "MHSA": points}, "Width": {"LS": [], "MHSA": []}}
    assert is_drawn(draw_points(panels, tmp_path / "points.png", ("tokens", "width"), "logit"))


@pytest.mark.parametrize("low", [1e-3, 0.31, 1.57, 90.1])
@pytest.mark.parametrize("ratio", [1.01, 1.1, 2, 50, 1e6])
def test_labels_of_a_logarithmic_axis_are_exact(low, ratio):
    _, axes = new_figure("losses", "step", "nats")
    axes.plot([0, 1], [low, low * ratio])
    scale_logarithmically(axes)
    labels = {tick: axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks()}
    assert {tick: float(label.replace(",", "")) for tick, label in labels.items() if tick < 1000} == {
        tick: pytest.approx(tick) for tick in labels if tick < 1000
    }

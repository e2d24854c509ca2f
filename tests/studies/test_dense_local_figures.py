import math

import pytest

from longshort.reporting.intervals import Interval
from longshort.studies.dense_local_figures import draw_bounds, draw_grid, draw_growth, draw_heat_maps

UNKNOWN = Interval(math.nan, -math.inf, math.inf, 3)
ONE = Interval(-1.0, -math.inf, math.inf, 1)
KNOWN = Interval(-12.0, -13.0, -11.0, 3)


def is_png(file):
    return file.read_bytes().startswith(b"\x89PNG")


def test_heat_maps_of_zeros_and_ones(tmp_path):
    matrices = {"Target": [[1.0, 0.0], [0.3, 0.7]], "Fit": [[1.0, 0.0], [1e-9, 1.0]]}
    assert is_png(draw_heat_maps(matrices, 62, tmp_path / "maps.png"))


def test_a_grid_with_cells_of_every_kind(tmp_path):
    cells = {("1", "1"): KNOWN, ("1", "2"): ONE, ("2", "1"): UNKNOWN, ("2", "2"): None}
    file = draw_grid({"Loss": cells, "Logit": cells}, tmp_path / "grid.png")
    assert is_png(file)
    other = {**cells, ("1", "1"): Interval(0.0, -1.0, 1.0, 3)}
    assert file.read_bytes() != draw_grid({"Loss": other, "Logit": cells}, tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("points", [[], [(8, ONE)], [(8, KNOWN.exp()), (16, UNKNOWN)]])
def test_growth_with_points_of_every_kind(tmp_path, points):
    panels = {"n": {"global": points, "local": points}, "d": {"global": [], "local": []}}
    assert is_png(draw_growth(panels, {"n": [(8, 1.0)], "d": []}, tmp_path / "growth.png"))


def test_bounds_without_fits(tmp_path):
    bounds = {"bound": [(1.0, 0.1), (2.0, 0.01)]}
    assert is_png(draw_bounds(bounds, {"held": []}, {}, tmp_path / "bounds.png"))
    assert is_png(
        draw_bounds(bounds, {"held": [(1.0, 0.2)]}, {"path": [(1.0, 0.5), (3.0, 1e-9)]}, tmp_path / "c.png")
    )

"""Heat maps are drawn for whatever was measured."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from longshort.reporting.heat_map import draw_heat_maps


@pytest.mark.parametrize(
    "by_head",
    [
        [[1.0, 2.0], [3.0, 400.0]],
        [[1.0], [2.0, 3.0]],
        [[None, 1.0], [float("nan"), float("inf")]],
        [[0.0, 0.0]],
        [[5.0, 5.0]],
        [[float("nan")]],
    ],
    ids=str,
)
def test_a_picture_is_drawn(by_head: list[list[float | None]], tmp_path: Path) -> None:
    panels = {"linear": by_head, "logarithmic": by_head}
    file = draw_heat_maps(panels, tmp_path / "map.png", logarithmic=("logarithmic",))
    height, width = image.imread(file).shape[:2]
    assert width > height > 100


def test_larger_numbers_have_lighter_colours(tmp_path: Path) -> None:
    pixels = {}
    for value in (1.0, 9.0):
        file = draw_heat_maps({"x": [[value, 10.0]]}, tmp_path / f"{value}.png")
        pixels[value] = image.imread(file)
    assert (np.abs(pixels[1.0] - pixels[9.0]).max(-1) > 0.1).sum() > 1000
    assert pixels[9.0].mean() > pixels[1.0].mean()

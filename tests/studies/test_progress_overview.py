"""The figure of logits at equal progress."""

from __future__ import annotations

import pytest
from tests.studies.planted import fill
from tests.studies.planted_progress import planted

from longshort.studies.progress import overview
from longshort.studies.progress.overview import FIGURE_FILE, mean_by_loss, overview_sections
from longshort.studies.progress.study import Progress

STUDY = Progress()


@pytest.fixture(scope="module")
def results():
    return fill(STUDY, "laptop", range(3), planted(logit=lambda trial, loss: 30 / loss))


def runs_of(results, seeds=range(3)):
    arms = STUDY.scales["laptop"].main[:2]
    return {arm.name: [results[arm.trial(3e-3, seed).key] for seed in seeds] for arm in arms}


def test_it_heads_the_report_from_the_first_run_on(results, tmp_path):
    whole = list(results)
    for count in (1, 2, len(whole)):
        part = {key: results[key] for key in whole[:count]}
        first = STUDY.findings("laptop", range(3), part, tmp_path).sections[0]
        assert first.heading == "Logits at equal progress"
        [figure] = first.figures
        assert figure.file == tmp_path / FIGURE_FILE and figure.file.read_bytes().startswith(b"\x89PNG")
    assert "MHSA on 3, LS on 3" in figure.caption
    assert not overview_sections({}, tmp_path)


def test_the_mean_is_taken_where_losses_are_equal(results):
    runs = runs_of(results)["MHSA"]
    mean = dict(mean_by_loss(runs))
    assert max(mean) == 2.6
    assert mean[2.0] == pytest.approx(15, rel=0.02) and mean[1.3] == pytest.approx(30 / 1.3, rel=0.02)
    slow = {
        **runs[0],
        "validation_curve": [[step, max(loss, 1.8)] for step, loss in runs[0]["validation_curve"]],
    }
    assert min(dict(mean_by_loss([*runs, slow]))) == 1.8


def drawn(runs, folder, monkeypatch):
    """The axes of the figure, by their title."""
    kept = {}

    def keep(canvas, file):
        kept.update({axes.get_title(loc="left"): axes for axes in canvas.axes})

    monkeypatch.setattr(overview, "save_figure", keep)
    overview.draw_overview(runs, folder / FIGURE_FILE)
    return kept["Largest logit by progress"], kept["Loss by tokens"]


def test_what_is_drawn(results, tmp_path, monkeypatch):
    left, right = drawn(runs_of(results), tmp_path, monkeypatch)
    lines = left.get_lines()
    [dashed] = [line for line in lines if line.get_linestyle() == "--"]
    [mhsa, ls] = [line for line in lines if line.get_linewidth() == 2.2]
    assert dashed.get_ydata() == pytest.approx([value / 20 for value in mhsa.get_ydata()])
    assert dashed.get_color() == mhsa.get_color() != ls.get_color()
    for axes in (left, right):
        dots = [line for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
        assert len(dots) == 6  # a drop of each seed
    assert len([line for line in lines if line.get_linewidth() == 0.8]) == 6
    assert left.get_xlim()[0] > left.get_xlim()[1] and left.get_yscale() == "log"
    labels = right.get_legend_handles_labels()[1]
    assert labels == ["MHSA", "MHSA/20", "LS", "begins to copy"]


def test_runs_that_do_not_copy_have_no_dot(tmp_path, monkeypatch):
    results = fill(STUDY, "laptop", range(3), planted(copies=False))
    for axes in drawn(runs_of(results), tmp_path, monkeypatch):
        assert not any(line.get_marker() == "o" and len(line.get_xdata()) for line in axes.get_lines())


def test_runs_whose_logits_were_lost_are_drawn_as_far_as_they_went(results, tmp_path, monkeypatch):
    runs = runs_of(results)
    lost = {**runs["LS"][0]["probe"], "max_logit": [None] * len(runs["LS"][0]["probe"]["step"])}
    left, right = drawn({**runs, "LS": [{**runs["LS"][0], "probe": lost}]}, tmp_path, monkeypatch)
    assert len([line for line in left.get_lines() if line.get_linewidth() == 2.2]) == 1
    assert len([line for line in right.get_lines() if line.get_linewidth() == 1.0]) == 4

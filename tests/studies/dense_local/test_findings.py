from __future__ import annotations

import math

import pytest
from tests.studies.dense_local.planted_fits import STUDY, make, run_all
from tests.studies.planted import findings_of

from longshort.reporting.intervals import Interval
from longshort.reporting.page import Report, render_report
from longshort.studies.dense_local.arms import arm_of, illustrated_pair, pairs
from longshort.studies.dense_local.figures import draw_bounds, draw_grid, draw_heat_maps
from longshort.studies.dense_local.theory import loss_bound
from longshort.studies.framework.sweep import sweep


def find(results, folder, seeds=3):
    return findings_of(STUDY, "smoke", range(seeds), results, folder)


@pytest.fixture(scope="module")
def planted():
    return run_all(make(lambda fit: 30.0 if fit.window < fit.span else 0.1))


@pytest.fixture(scope="module")
def found(planted, tmp_path_factory):
    """The findings of planted results, judged and drawn once."""
    return STUDY.findings("smoke", range(3), planted, tmp_path_factory.mktemp("planted"))


def section(findings, heading):
    return next(section for section in findings.sections if section.heading.startswith(heading))


def test_all_figures_are_drawn_and_fit_into_a_report(found):
    names = {figure.file.name for section in found.sections for figure in section.figures}
    assert names == {"heatmaps.png", "loss.png", "grid.png", "logits.png", "growth.png", "bounds.png"}
    page = render_report(Report("title", "subtitle", found.sections))
    assert page.count("<img") == 6


def test_narrow_windows_are_shown_apart(found):
    losses, narrow = section(found, "Training loss"), section(found, "Windows that are too narrow")
    assert losses.table is not None and len(losses.table.rows) == 9
    assert all(row[-1] == "300 / 300" for row in losses.table.rows)
    assert "lower in 9 of 9 combinations and higher in 0" in losses.paragraphs[0]
    assert narrow.table is not None and len(narrow.table.rows) == 3
    assert all(row[0].endswith("w/l' = 0.5") for row in narrow.table.rows)
    assert "cannot reach the target" in narrow.paragraphs[0]


def test_fits_without_a_plateau_are_counted(tmp_path):
    def run(trial):
        made = make(lambda _fit: 0.1)(trial)
        return made | ({"plateau_at": None} if trial.settings["window"] is None and trial.seed else {})

    losses = section(find(run_all(run), tmp_path), "Training loss")
    assert losses.table is not None
    assert {row[-1] for row in losses.table.rows} == {"not reached by 2 of 3 / 300"}


def test_logits_are_compared_in_the_window_too(found):
    logits = section(found, "Largest logit")
    assert logits.table is not None and len(logits.table.rows) == 9
    assert all(row[2] == row[1] for row in logits.table.rows)  # planted alike
    assert "smaller in 9 of 9 combinations and larger in 0" in logits.paragraphs[0]


def test_what_is_not_run_is_left_out(planted, tmp_path):
    """Half of the results, and none at all."""
    half = dict(list(planted.items())[: len(planted) // 2])
    for results in (half, {}):
        findings = STUDY.findings("smoke", range(3), results, tmp_path)
        render_report(Report("title", "subtitle", findings.sections))


def test_fits_that_diverged_are_drawn_as_far_as_they_went(tmp_path):
    def run(trial):
        made = make(lambda _fit: 0.1)(trial)
        if trial.settings["window"] is None and trial.seed == 1:
            made |= dict.fromkeys(("loss", "max_logit", "row_range"))
            made |= {name: [*made[name][:-1], None] for name in ("losses", "max_logits")}
            made["max_logit_in_band"] = [[window, None] for window, _ in made["max_logit_in_band"]]
        return made

    findings = STUDY.findings("smoke", range(3), run_all(run), tmp_path)
    losses = section(findings, "Training loss")
    assert losses.table is not None and "not finite" in losses.table.rows[0][1]


def test_growth_says_from_where_to_where(found):
    growth = section(found, "Growth")
    assert "With tokens n from 16 to 24: global from" in growth.paragraphs[0]
    assert "local from" in growth.paragraphs[0]


def test_growth_is_also_shown_at_one_rate(tmp_path):
    def run(trial):
        made = make(lambda _fit: 0.1)(trial)
        return made | ({"max_logit": 77.0} if trial.settings["learning_rate"] == 0.1 else {})

    growth = section(find(run_all(run, seeds=2), tmp_path, seeds=2), "Growth")
    assert growth.table is not None
    assert [row[0] for row in growth.table.rows] == ["n = 16", "n = 24", "d = 4", "d = 8", "σ = 1"]
    assert {cell for row in growth.table.rows for cell in row[3:]} == {"77"}


def test_controls_say_whether_global_attention_stays_at_the_local_fit(found):
    controls = section(found, "Controls")
    assert controls.table is not None
    assert [row[0] for row in controls.table.rows] == [
        "local against global with ALiBi",
        "local against global with d = 7",
        "local against global from the local fit",
        "targets anywhere, no band",
    ]
    assert "trained from there, global attention ended with" in controls.paragraphs[1]


def test_a_table_has_the_pairs_of_its_topic(found):
    layers = section(found, "Through a real attention layer")
    assert layers.table is not None
    assert [row[0] for row in layers.table.rows] == [p.label for p in pairs("smoke") if p.topic == "layer"]
    assert len(layers.paragraphs) == 1


def test_theory_puts_bounds_beside_fits(found):
    theory = section(found, "Theory")
    fit = illustrated_pair("smoke").other
    assert theory.table is not None
    [row] = theory.table.rows
    bound, exact = (float(cell) for cell in row[1:3])
    assert bound == pytest.approx(loss_bound(fit.length, fit.span, float(row[0])), rel=1e-3)
    assert exact >= bound
    assert "upper bound" in theory.paragraphs[1]


def test_arms_at_the_edge_of_their_sweep_are_named(tmp_path):
    results = run_all(make(lambda _fit: 1.0, noise=0.001, best_rate=31600.0), seeds=2)
    arm = arm_of(illustrated_pair("smoke").other)
    assert sweep(arm, results, 0).is_at_edge
    text = section(find(results, tmp_path, seeds=2), "How this was run").paragraphs[1]
    assert "global, n=24 d=4 l'=4 σ=1 (" in text
    inside = run_all(make(lambda _fit: 1.0, noise=0.001), seeds=2)
    text = section(find(inside, tmp_path, seeds=2), "How this was run").paragraphs[1]
    assert "global, n=24 d=4 l'=4 σ=1 (" not in text


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


def test_bounds_without_fits(tmp_path):
    bounds = {"bound": [(1.0, 0.1), (2.0, 0.01)]}
    assert is_png(draw_bounds(bounds, {"held": []}, {}, tmp_path / "bounds.png"))
    assert is_png(
        draw_bounds(bounds, {"held": [(1.0, 0.2)]}, {"path": [(1.0, 0.5), (3.0, 1e-9)]}, tmp_path / "c.png")
    )

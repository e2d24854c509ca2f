import pytest
from tests.studies.dense_local_results import make, run_all

from longshort.reporting.page import Report, render_report
from longshort.studies.dense_local_findings import find


@pytest.fixture(scope="module")
def planted():
    return run_all(make(lambda fit: 30.0 if fit.window < fit.span else 0.1))


def section(findings, heading):
    return next(section for section in findings.sections if section.heading.startswith(heading))


def test_all_figures_are_drawn_and_fit_into_a_report(planted, tmp_path):
    findings = find("smoke", range(3), planted, tmp_path)
    names = {figure.file.name for section in findings.sections for figure in section.figures}
    assert names == {"heatmaps.png", "loss.png", "grid.png", "logits.png", "growth.png", "bounds.png"}
    page = render_report(Report("title", "subtitle", findings.sections))
    assert page.count("<img") == 6


def test_narrow_windows_are_shown_and_explained(planted, tmp_path):
    losses = section(find("smoke", range(3), planted, tmp_path), "Training loss")
    assert losses.table is not None and len(losses.table.rows) == 12
    narrow = [row for row in losses.table.rows if row[0].endswith("w/l' = 0.5")]
    assert len(narrow) == 3 and all(float(row[4].split(" ")[0]) > 10 for row in narrow)
    assert "lower in 9 of 9 combinations and higher in 0" in losses.paragraphs[0]
    assert "cannot reach the target" in losses.paragraphs[0]


def test_logits_are_compared_in_the_window_too(planted, tmp_path):
    logits = section(find("smoke", range(3), planted, tmp_path), "Largest logit")
    assert logits.table is not None and len(logits.table.rows) == 12
    assert "smaller in 9 of 12 combinations and larger in 3" in logits.paragraphs[0]


def test_what_is_not_run_is_left_out(planted, tmp_path):
    """Half of the results, and none at all."""
    half = dict(list(planted.items())[: len(planted) // 2])
    for results in (half, {}):
        findings = find("smoke", range(3), results, tmp_path)
        render_report(Report("title", "subtitle", findings.sections))


def test_fits_that_diverged_are_drawn_as_far_as_they_went(tmp_path):
    def run(trial):
        made = make(lambda _fit: 0.1)(trial)
        if trial.settings["window"] is None and trial.seed == 1:
            made |= dict.fromkeys(("loss", "max_logit", "row_range"))
            made |= {name: [*made[name][:-1], None] for name in ("losses", "max_logits")}
            made["max_logit_in_band"] = [[window, None] for window, _ in made["max_logit_in_band"]]
        return made

    findings = find("smoke", range(3), run_all(run), tmp_path)
    losses = section(findings, "Training loss")
    assert losses.table is not None and "not finite" in losses.table.rows[0][1]

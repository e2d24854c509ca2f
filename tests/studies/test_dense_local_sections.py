import pytest
from tests.studies.dense_local_results import make, run_all

from longshort.studies.dense_local_arms import illustrated_pair, pairs, sweep
from longshort.studies.dense_local_sections import (
    controls_section,
    growth_section,
    method_section,
    pairs_section,
    theory_section,
)
from longshort.studies.dense_local_theory import loss_bound


@pytest.fixture(scope="module")
def planted():
    return run_all(make(lambda _fit: 0.1))


def test_growth_says_from_where_to_where(planted, tmp_path):
    text = growth_section("smoke", range(3), planted, tmp_path).paragraphs[0]
    assert "With tokens n from 16 to 24: global from" in text and "local from" in text


def test_growth_is_also_shown_at_one_rate(tmp_path):
    def run(trial):
        made = make(lambda _fit: 0.1)(trial)
        return made | ({"max_logit": 77.0} if trial.settings["learning_rate"] == 0.1 else {})

    section = growth_section("smoke", range(2), run_all(run, seeds=2), tmp_path)
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == ["n = 16", "n = 24", "d = 4", "d = 8", "σ = 1"]
    assert {cell for row in section.table.rows for cell in row[3:]} == {"77"}


def test_controls_say_whether_global_attention_stays_at_the_local_fit(planted):
    section = controls_section("smoke", range(3), planted)
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == [
        "local against global with ALiBi",
        "local against global with d = 7",
        "local against global from the local fit",
        "targets anywhere, no band",
    ]
    assert "global attention went on from there to" in section.paragraphs[1]


def test_a_table_has_the_pairs_of_its_topics(planted):
    section = pairs_section("Heading", ("layer",), "smoke", range(3), planted, "Text.")
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == [p.label for p in pairs("smoke") if p.topic == "layer"]
    assert section.paragraphs == ("Text.",)


def test_theory_puts_bounds_beside_fits(planted, tmp_path):
    section = theory_section("smoke", range(3), planted, tmp_path)
    fit = illustrated_pair("smoke").other
    assert section.table is not None
    [row] = section.table.rows
    bound, exact = (float(cell) for cell in row[1:3])
    assert bound == pytest.approx(loss_bound(fit.length, fit.span, float(row[0])), rel=1e-3)
    assert exact >= bound
    assert "upper bound" in section.paragraphs[1]


def test_arms_at_the_edge_of_their_sweep_are_named():
    results = run_all(make(lambda _fit: 1.0, noise=0.001, best_rung=9), seeds=2)
    arm = illustrated_pair("smoke").other
    assert sweep(arm, results).is_at_edge
    text = method_section("smoke", range(2), results).paragraphs[1]
    assert "global, n=24 d=4 l'=4 σ=1 (" in text
    inside = run_all(make(lambda _fit: 1.0, noise=0.001, best_rung=-2), seeds=2)
    assert "global, n=24 d=4 l'=4 σ=1 (" not in method_section("smoke", range(2), inside).paragraphs[1]

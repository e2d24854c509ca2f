from __future__ import annotations

from longshort.reporting.page import Section, Table
from longshort.studies.framework.page import write_study_report
from longshort.studies.framework.study import Claim, Findings, Outcome, Verdict

CLAIM = Claim("F9", "Logits <grow>.", "They do not.", "Shown if they do.")
MANIFEST = {"scale": "smoke", "source": "stdlib", "made_with": ["longshort 1, torch 2, CPU with AVX2"]}


def test_the_page_shows_every_verdict_twice_with_its_rule(tmp_path):
    details = Section("Details", table=Table(("a",), [("b",)]))
    found = {"Growth": Findings([Verdict(CLAIM, Outcome.PARTLY, "They grow by 3.")], [details])}
    page = write_study_report(tmp_path, MANIFEST, found).read_text()
    assert page.count("partly shown") == 2
    for text in (
        "F9",
        "Logits &lt;grow&gt;.",
        "They do not.",
        "Shown if they do.",
        "They grow by 3.",
        "Details",
    ):
        assert text in page
    assert "badge mixed" in page
    assert page.count('<table class="text">') == page.count("<table>") == 1
    assert "Scale smoke, corpus stdlib; longshort 1, torch 2, CPU with AVX2" in page


def test_studies_with_p_values_and_without_verdicts_are_named(tmp_path):
    def page_of(p):
        found = {
            "Growth": Findings([Verdict(CLAIM, Outcome.SHOWN, "They grow.", p)], []),
            "Rounding": Findings([Verdict(CLAIM, Outcome.SHOWN, "They grow.")], []),
            "Controls": Findings([], []),
        }
        return write_study_report(tmp_path, MANIFEST, found).read_text()

    page = page_of(0.01)
    assert "These have p-values: Growth." in page
    assert page.count("this study judges no claim") == 1
    assert "P-values" not in page_of(None)


def test_every_outcome_has_a_badge(tmp_path):
    verdicts = [Verdict(CLAIM, outcome, "…") for outcome in Outcome]
    page = write_study_report(tmp_path, MANIFEST, {"All": Findings(verdicts, [])}).read_text()
    assert page.count('class="badge') == len(Outcome)

from __future__ import annotations

import json

import pytest

from longshort.cli import main
from longshort.studies.framework.claims import (
    FINDINGS_FILE,
    claim_rows,
    claim_table,
    claims_markdown,
    read_claims,
    write_findings,
)
from longshort.studies.framework.study import Claim, Findings, Outcome, Verdict

GROW = Claim("F9: growth", "Logits grow.", "They do not.", "Shown if they do.", paper="20 times")
OURS = Claim("F9: more", "They |grow| more.", "They do not.", "Shown if they do.")


def findings(outcome=Outcome.SHOWN, here="3 times"):
    verdicts = [
        Verdict(GROW, outcome, "They grow 3 times over, in all.", 0.01, here),
        Verdict(OURS, Outcome.PARTLY, "Somewhat.", tested="n = 8"),
    ]
    return Findings(verdicts, [], tested="n = 64, 2 seeds")


def folder_of(path, found, study="toy"):
    (path / study).mkdir(parents=True)
    write_findings(path / study, found)
    return path


def test_the_table_sets_the_paper_beside_what_was_found():
    table = claim_table(claim_rows(findings()))
    assert table.header == ("claim", "paper", "here", "direction", "tested up to")
    assert table.is_text
    assert table.rows == [
        ("F9: growth. Logits grow.", "20 times", "3 times", "✓ shown", "n = 64, 2 seeds"),
        ("F9: more. They |grow| more.", "–", "Somewhat.", "✓ partly shown", "n = 8"),
    ]


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_a_direction(outcome):
    row = claim_table(claim_rows(findings(outcome))).rows[0]
    sign = {"✓": ("SHOWN", "PARTLY"), "✗": ("CONTRADICTED",), "–": ("ILLUSTRATED",)}
    assert outcome.name in sign.get(row[3][0], ("NOT_SHOWN", "NOT_MEASURED", "NOT_REACHED"))
    assert row[3].startswith("open: ") == outcome.name.startswith("NOT")
    assert (row[4] == "–") == (outcome is Outcome.NOT_MEASURED)


def test_markdown_has_a_line_per_claim_and_no_bar_within_a_cell():
    lines = claims_markdown(claim_rows(findings())).splitlines()
    assert len(lines) == 4 and lines[1] == "| --- | --- | --- | --- | --- |"
    assert {line.count("|") for line in lines} == {6}


def test_what_was_written_is_read(tmp_path):
    folder = folder_of(tmp_path / "a", findings())
    assert read_claims([folder], ["other", "toy"]) == claim_rows(findings())


def test_a_claim_is_read_from_the_first_folder_in_which_it_was_measured(tmp_path):
    first = folder_of(tmp_path / "first", findings(Outcome.NOT_MEASURED))
    second = folder_of(tmp_path / "second", findings(Outcome.SHOWN, here="4 times"))
    third = folder_of(tmp_path / "third", findings(Outcome.CONTRADICTED), study="another")
    rows = read_claims([first, second, third], ["toy", "another"])
    assert [row.outcome.name for row in rows] == ["SHOWN", "PARTLY", "CONTRADICTED", "PARTLY"]
    assert rows[0].here == "4 times" and rows[1].id == "F9: more"


def test_a_claim_that_no_folder_measured_is_read_from_the_first(tmp_path):
    first, second = (
        folder_of(tmp_path / name, findings(Outcome.NOT_MEASURED, here=name)) for name in ("first", "second")
    )
    assert read_claims([first, second], ["toy"])[0].here == "first"


def test_findings_of_earlier_versions_are_read(tmp_path):
    folder = folder_of(tmp_path / "a", findings())
    file = folder / "toy" / FINDINGS_FILE
    content = json.loads(file.read_text())
    for verdict in content["verdicts"]:
        del verdict["here"], verdict["tested"], verdict["claim"]["paper"]
    file.write_text(json.dumps(content))
    row = claim_table(read_claims([folder], ["toy"])).rows[0]
    assert row[1:] == ("–", "They grow 3 times over, in all.", "✓ shown", "–")


@pytest.mark.parametrize("text", ["{", "[]", '{"verdicts": [{"outcome": "shown"}]}', '{"verdicts": [3]}'])
def test_a_damaged_file_is_named(tmp_path, text):
    folder = folder_of(tmp_path / "a", findings())
    (folder / "toy" / FINDINGS_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"toy.findings\.json is damaged"):
        read_claims([folder], ["toy"])


def test_the_command_prints_the_table(tmp_path, capsys):
    folder = folder_of(tmp_path / "a", findings(), study="latency")
    assert main(["claims", str(folder)]) == 0
    assert capsys.readouterr().out == claims_markdown(claim_rows(findings()))
    assert main(["claims", str(tmp_path)]) == 1
    assert "holds no findings" in capsys.readouterr().err
    assert main(["claims"]) == 2

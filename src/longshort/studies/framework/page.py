"""The report page of the studies: every claim with its measurements, then numbers and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longshort.reporting.page import Card, Report, Section, write_page
from longshort.studies.framework.claims import claim_rows, claim_table
from longshort.studies.framework.study import Findings, Outcome, Verdict

_TONES = {
    Outcome.SHOWN: "good",
    Outcome.PARTLY: "mixed",
    Outcome.NOT_SHOWN: "neutral",
    Outcome.CONTRADICTED: "bad",
    Outcome.ILLUSTRATED: "neutral",
    Outcome.NOT_MEASURED: "neutral",
    Outcome.NOT_REACHED: "neutral",
}


def write_study_report(folder: Path, manifest: Mapping[str, Any], found: Mapping[str, Findings]) -> Path:
    """Write FOLDER/report.html from the findings of each study, by its title.

    Raises:
        OSError: the file could not be written.
    """
    sections = [_overview(found)]
    for title, findings in found.items():
        text = [] if findings.verdicts else ["Measurements without verdicts: this study judges no claim."]
        sections.append(Section(title, text, cards=[_card(verdict) for verdict in findings.verdicts]))
        sections += findings.sections
    made_with = "; ".join(manifest["made_with"])
    report = Report(
        title="LS-attention: the paper's claims, measured",
        subtitle=f"Scale {manifest['scale']}, corpus {manifest['source']}; {made_with}",
        sections=sections,
    )
    return write_page(report, folder)


def _overview(found: Mapping[str, Findings]) -> Section:
    rows = [row for findings in found.values() for row in claim_rows(findings)]
    tested = [title for title, findings in found.items() if any(v.p is not None for v in findings.verdicts)]
    correction = (
        "P-values are held to Holm's correction over the claims of one study. These have p-values: "
        f"{'; '.join(tested)}."
    )
    return Section(
        paragraphs=[
            (
                "Each claim has a rule that was written down before the trials were run; the rules stand "
                "beside the verdicts below. Intervals are 95 % confidence intervals over seeds, paired where "
                "two arms are compared; in tables of arms they are prediction intervals: where another "
                "seed's value will lie."
            ),
            *([correction] if tested else []),
        ],
        table=claim_table(rows),
    )


def _card(verdict: Verdict) -> Card:
    return Card(
        title=verdict.claim.id,
        badge=verdict.outcome.value,
        tone=_TONES[verdict.outcome],
        text=verdict.claim.statement,
        rows=[
            ("measured", verdict.evidence),
            ("against it", verdict.claim.falsifier),
            ("rule", verdict.claim.rule),
        ],
    )

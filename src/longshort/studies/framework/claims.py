"""The claims of studies in one table: the paper's result, the result here, and how far it was tested.

FOLDER/STUDY/findings.json holds what the table needs, so that it can be made from stored results of several
scales without judging them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longshort.reporting.files import replace_file, strict_json
from longshort.reporting.page import Table
from longshort.studies.framework.study import Findings, Outcome

FINDINGS_FILE = "findings.json"

_DIRECTIONS = {
    Outcome.SHOWN: "✓ shown",
    Outcome.PARTLY: "✓ partly shown",
    Outcome.CONTRADICTED: "✗ contradicted",
    Outcome.NOT_SHOWN: "open: not shown",
    Outcome.NOT_MEASURED: "open: not measured",
    Outcome.NOT_REACHED: "open: not reached",
    Outcome.ILLUSTRATED: "– illustrated",
}


@dataclass(frozen=True)
class ClaimRow:
    """A row of the table: a claim and its outcome.

    Attributes:
        id, statement: those of the claim.
        paper: the paper's result, in a number or a few words; empty for questions of ours.
        here: the result that was measured here.
        outcome: the verdict's outcome.
        tested: how far it was tested: lengths, tokens, seeds.
    """

    id: str
    statement: str
    paper: str
    here: str
    outcome: Outcome
    tested: str


def claim_rows(findings: Findings) -> list[ClaimRow]:
    """Make the rows of one study."""
    return _rows(_content(findings))


def claim_table(rows: Iterable[ClaimRow]) -> Table:
    """Make the table: claim, paper, here, direction and how far it was tested."""
    cells = [
        (f"{row.id}. {row.statement}", row.paper or "–", row.here, _DIRECTIONS[row.outcome], _tested(row))
        for row in rows
    ]
    return Table(("claim", "paper", "here", "direction", "tested up to"), cells, is_text=True)


def _tested(row: ClaimRow) -> str:
    return "–" if row.outcome is Outcome.NOT_MEASURED else row.tested or "–"


def claims_markdown(rows: Iterable[ClaimRow]) -> str:
    """Format the table in Markdown."""
    table = claim_table(rows)
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def write_findings(folder: Path, findings: Findings) -> None:
    """Write FOLDER/findings.json; an old file is replaced.

    Raises:
        OSError: the file could not be written.
    """
    replace_file(folder / FINDINGS_FILE, strict_json(_content(findings)).encode())


def read_claims(folders: Sequence[Path], studies: Sequence[str]) -> list[ClaimRow]:
    """Read the claims of studies from folders of results, such as those of several scales.

    A claim that several folders hold is read from the first in which it was measured, else from the first.

    Args:
        folders: folders with a folder per study.
        studies: names of studies, in the order of the table.

    Raises:
        FileNotFoundError: a folder holds findings of none of the studies.
        ValueError: a file is damaged.
    """
    for folder in folders:
        if not any((folder / name / FINDINGS_FILE).is_file() for name in studies):
            raise FileNotFoundError(f"{folder} holds no findings; `longshort study` writes them")
    chosen: dict[tuple[str, str], ClaimRow] = {}
    for name in studies:
        for file in (folder / name / FINDINGS_FILE for folder in folders):
            for row in _read(file) if file.is_file() else ():
                key = name, row.id
                known = chosen.setdefault(key, row)
                if known.outcome is Outcome.NOT_MEASURED and row.outcome is not Outcome.NOT_MEASURED:
                    chosen[key] = row
    return list(chosen.values())


def _read(file: Path) -> list[ClaimRow]:
    try:
        return _rows(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None


def _rows(content: Mapping[str, Any]) -> list[ClaimRow]:
    return [
        ClaimRow(
            id=verdict["claim"]["id"],
            statement=verdict["claim"]["statement"],
            paper=verdict["claim"].get("paper", ""),
            here=verdict.get("here") or verdict["evidence"],
            outcome=Outcome(verdict["outcome"]),
            tested=verdict.get("tested", ""),
        )
        for verdict in content["verdicts"]
    ]


def _content(findings: Findings) -> dict[str, Any]:
    return {
        "verdicts": [
            {
                "claim": asdict(verdict.claim),
                "outcome": verdict.outcome.value,
                "evidence": verdict.evidence,
                "here": verdict.here,
                "p": verdict.p,
                "tested": verdict.tested or findings.tested,
            }
            for verdict in findings.verdicts
        ],
        "prediction_intervals": {
            arm: {quantity: [interval.low, interval.high] for quantity, interval in row.items()}
            for arm, row in findings.predictions.items()
        },
    }

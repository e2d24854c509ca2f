"""The files of a study: OUT/NAME/results.jsonl, a line per finished trial, and timing.jsonl beside it.

results.jsonl holds only pure functions of settings, corpus and machine, in the order of the plan, so it is
the same file whether the study was interrupted or not. Measured times are in timing.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longshort.reporting.files import finite_or_none, parse_json_line, replace_file
from longshort.studies.framework.study import Trial

RESULTS_FILE = "results.jsonl"
TIMING_FILE = "timing.jsonl"


class ResultsFile:
    """The finished trials of one study; every `add` leaves complete files.

    Args:
        folder: the study's folder; it may not exist yet.

    Raises:
        ValueError: a file there is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records = {line["key"]: line for line in _read(folder / RESULTS_FILE)}
        self._timings = {line["key"]: line for line in _read(folder / TIMING_FILE)}
        self._plan: Sequence[Trial] = ()

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Return the results by the key of their trial, with measured times under "timing"."""
        return {
            key: {**record["result"], "timing": self._timings.get(key, {}).get("timing", {})}
            for key, record in self._records.items()
        }

    def order(self, plan: Sequence[Trial]) -> None:
        """Set the order of the lines. Results of trials outside the plan are kept, after the others."""
        is_new = [trial.key for trial in plan] != [trial.key for trial in self._plan]
        self._plan = plan
        if self._records and is_new:
            self._write()

    def add(self, trial: Trial, result: dict[str, Any]) -> None:
        """Write the result of a trial; its key "timing" is written to the other file."""
        result = finite_or_none(result)
        name = {"key": trial.key, "arm": trial.arm, "seed": trial.seed}
        self._timings[trial.key] = {**name, "timing": result.pop("timing", {})}
        self._records[trial.key] = {**name, "settings": dict(trial.settings), "result": result}
        self._write()

    def _write(self) -> None:
        keys = dict.fromkeys([*(trial.key for trial in self._plan), *sorted(self._records)])
        for file, records in ((TIMING_FILE, self._timings), (RESULTS_FILE, self._records)):
            lines = (json.dumps(records[key], allow_nan=False) for key in keys if key in records)
            replace_file(self._folder / file, "".join(f"{line}\n" for line in lines).encode())


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [parse_json_line(line, path, number, "key") for number, line in enumerate(lines, start=1)]

"""What `longshort` says without arguments: the commands, what lies in this folder, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST_STEPS = """\
first steps, in some minutes and without a download:
  longshort doctor                                     what this machine offers
  longshort data stdlib --out runs/data                text to tokens
  longshort train tiny --data runs/data --out runs/first --steps 200
  longshort generate runs/first --prompt "def "
or all at once, LS-attention beside full attention:
  longshort demo --out runs/demo
"""


@dataclass(frozen=True)
class _Run:
    folder: Path
    step: int
    """The step of its latest checkpoint; 0 without one."""
    steps: int
    changed: float


def next_steps(folder: Path) -> str:
    """Describe the data and the newest run in a folder, in its subfolders or in its runs/, and name the next
    commands; without any, the first steps."""
    places = [folder, *_subfolders(folder), *_subfolders(folder / "runs")]
    runs = [run for run in map(_as_run, places) if run is not None]
    if runs:
        return _after_run(max(runs, key=lambda run: run.changed), folder)
    data = next(filter(_is_data, places), None)
    return FIRST_STEPS if data is None else _after_data(data, folder)


def _after_data(data: Path, folder: Path) -> str:
    name = _name(data, folder)
    return f"next, with the tokens in {name}:\n  longshort train tiny --data {name} --out runs/first\n"


def _after_run(run: _Run, folder: Path) -> str:
    name = _name(run.folder, folder)
    lines = [f"next, with the run {name}, of which {run.step} of {run.steps} steps are saved:"]
    if run.step < run.steps:
        lines.append(f"  longshort train --resume {name}")
    if run.step:
        lines += [f"  longshort evaluate {name}", f'  longshort generate {name} --prompt "def "']
    return "\n".join(lines) + "\n"


def _name(path: Path, folder: Path) -> str:
    return shlex.quote(str(path.relative_to(folder)))


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError:
        return []


def _is_data(folder: Path) -> bool:
    return all(
        os.path.isfile(folder / f"{split}.{kind}")  # False without permission, unlike Path
        for split in ("train", "validation")
        for kind in ("bin", "json")
    )


def _as_run(folder: Path) -> _Run | None:
    """Read what a run's files say, without what imports torch; None if this is no run, or a damaged one."""
    try:
        config: Any = json.loads((folder / "config.json").read_text())
        steps = config["training"]["steps"]
        changed = max(path.stat().st_mtime for path in (folder, *folder.glob("metrics.jsonl")))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    names = [path.name.removeprefix("step-") for path in folder.glob("checkpoints/step-*")]
    saved = [int(name) for name in names if name.isdecimal()]
    return _Run(folder, max(saved, default=0), steps, changed) if isinstance(steps, int) else None

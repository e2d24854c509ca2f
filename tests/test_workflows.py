"""The make targets and the files that GitHub's workflows name exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def targets_called(workflow: Any) -> Iterator[str]:
    """Yield the targets of steps `make TARGET` and, from the matrix, of steps `make "$TARGET"`."""
    for job in workflow["jobs"].values():
        for step in job.get("steps", []):
            calls = re.findall(r"\bmake ([^\n;&|]+)", step.get("run", ""))
            for target in (word for call in calls for word in shlex.split(call) if word[0] != "-"):
                if not target.startswith("$"):
                    yield target
                    continue
                key = step["env"][target[1:]].removeprefix("${{ matrix.").removesuffix(" }}")
                yield from (case[key] for case in job["strategy"]["matrix"]["include"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_targets_and_paths_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set(targets_called(workflow))
    assert called <= targets
    assert called or path.name == "release.yml"
    events = workflow[True]  # YAML 1.1 takes the key "on" for a truth value
    for event in events.values():
        for pattern in event.get("paths", []) if isinstance(event, dict) else []:
            assert next(ROOT.glob(pattern), None), pattern

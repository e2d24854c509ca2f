"""The notebook in examples/: as it is committed, and from top to bottom."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from docs.render import run_notebook
from nbformat.v4 import new_code_cell

NOTEBOOK = Path(__file__).parents[1] / "examples" / "ls_attention.ipynb"
VALUES = """
import json
print(json.dumps({
    "stats": [list(stats.max_logit.shape), list(out.shape)],
    "seen": seen.tolist(),
    "row_sums": probabilities.sum(-1).tolist(),
    "losses": {name: [records[0]["loss"], records[-1]["loss"]] for name, records in metrics.items()},
    "logits": {name: [record["max_logit"] for record in records] for name, records in metrics.items()},
    "by_head": {name: list(logits.shape) for name, logits in by_head.items()},
    "written": written, "same_text": same_text, "cache_bytes": cache_bytes,
    "llama": [reading.max_logit_by_head for reading in readings.values()],
}))
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_committed_with_its_output(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_it_holds_no_times_and_no_folders_of_a_machine(notebook):
    assert [dict(cell.metadata) for cell in notebook.cells] == [{}] * len(notebook.cells)
    assert set(notebook.metadata) == {"kernelspec"}
    assert not re.search(r"/tmp/|/home/|/root/", NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < 300_000


def test_its_links_lead_to_files(notebook):
    links = [link for cell in notebook.cells for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    assert links
    assert all((NOTEBOOK.parent / link.partition("#")[0]).exists() for link in links)


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook.cells.append(new_code_cell(VALUES))
    run_notebook(notebook, tmp_path)
    values = json.loads(notebook.cells[-1].outputs[0].text)
    assert values["stats"] == [[4], [1, 4, 48, 48]]
    assert values["seen"] == [[min(row + 1, 8) for row in range(48)]] * 3 + [list(range(1, 49))]
    assert all(abs(total - 1) < 1e-5 for head in values["row_sums"] for total in head)
    for first, last in values["losses"].values():
        assert 5 < first < 6  # nats: of 257 bytes, nothing is known yet
        assert last < 3
    assert all(logit > 0 for logits in values["logits"].values() for logit in logits)
    assert values["by_head"] == {"LS": [2, 4], "MHSA": [2, 4]}
    assert values["written"]
    assert values["same_text"] is True
    assert values["cache_bytes"]["LS"] < values["cache_bytes"]["MHSA"]
    assert values["cache_bytes"]["local and global heads"] < values["cache_bytes"]["full attention"]
    full, split = values["llama"]
    assert split[0][-2:] == pytest.approx(full[0][-2:], rel=1e-5)  # the global heads of the first layer

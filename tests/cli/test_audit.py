import json
import shutil

import pytest

from longshort.cli import main
from longshort.data import DataFolder
from longshort.training.audit import audit_trained
from longshort.training.trained import open_trained


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_table_and_json(run, data, tmp_path, capsys):
    before, file = contents(run), tmp_path / "numbers.json"
    flags = ["--batches", "3", "--batch-size", "2", "--split", "validation", "--seed", "4", "--threads", "1"]
    assert main(["audit", str(run), *flags, "--precisions", "bf16", "fp32", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    content = json.loads(file.read_text())
    expected = audit_trained(
        open_trained(run), DataFolder.open(data), split="validation", batches=3, batch_size=2, seed=4,
        precisions=["bf16", "fp32"],
    )  # fmt: skip
    assert content == {"run": str(run), "data": str(data), **expected}
    rows = [line.split() for line in shown.splitlines() if line.split()[0] in ("bf16", "fp32")]
    assert len(rows) == 4
    for row, error in zip(rows, expected["errors"], strict=True):
        assert row[:3] == [error["precision"], str(error["layer"]), error["matrix"].upper()]
        numbers = [error[name] for name in ("bias", "bias_error", "noise", "mean_error")]
        assert [float(cell) for cell in row[3:]] == pytest.approx(numbers, rel=0.06, abs=0.006)
    assert "after step 12 on 3 batches of 2 sequences of 32 tokens (validation)" in shown
    assert contents(run) == before


def test_by_default_all_precisions_and_no_file(run, capsys):
    before = contents(run)
    assert main(["audit", str(run), "--batches", "2"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n {name} " in shown for name in ("fp32", "bf16", "bf16-flash", "sdpa-bf16"))
    assert contents(run) == before


def test_a_checkpoint_is_chosen_by_its_step(fails, run, capsys):
    shutil.copytree(run / "checkpoints" / "step-12", run / "checkpoints" / "step-7")
    assert main(["audit", str(run), "--batches", "2", "--checkpoint", "7", "--precisions", "fp32"]) == 0
    assert "after step 7 " in capsys.readouterr().out
    message = fails(1, "audit", run, "--checkpoint", "8")
    assert "has no checkpoint of step 8, only of 7, 12" in message


def test_a_precision_that_is_left_out_is_told(run, data, capsys):
    config = json.loads((run / "config.json").read_text())
    config["model"]["softcap"] = 5.0
    (run / "config.json").write_text(json.dumps(config))
    assert main(["audit", str(run), "--batches", "2"]) == 0
    assert "sdpa-bf16 is left out: attention_precision 'sdpa-bf16' does not go" in capsys.readouterr().out


def test_moved_data(fails, run, data, corpus, tmp_path):
    other = shutil.copytree(data, tmp_path / "moved")
    assert main(["audit", str(run), "--batches", "2", "--precisions", "fp32", "--data", str(other)]) == 0
    assert "no data folder" in fails(1, "audit", run, "--data", tmp_path / "nowhere")
    assert main(["data", str(corpus), "--out", str(tmp_path / "more"), "--validation-fraction", "0.5"]) == 0
    message = fails(1, "audit", run, "--data", tmp_path / "more")
    assert "is not the data that this run was started on" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batches", "1"], "--batches must be an integer >= 2, got 1"),
        (["--batch-size", "0"], "--batch-size"),
        (["--checkpoint", "-1"], "--checkpoint"),
        (["--precisions", "fp8"], "fp8"),
        (["--split", "test"], "--split"),
        (["--seed", "-1"], "--seed"),
        (["--device", "abacus"], "--device"),
    ],
    ids=str,
)
def test_wrong_usage(fails, trained, flags, message):
    assert message in fails(2, "audit", trained, *flags)


def test_wrong_folders_and_files_are_failures(fails, run, tmp_path):
    assert "not the folder of a run" in fails(1, "audit", tmp_path)
    mine = tmp_path / "mine"
    mine.write_text("precious")
    assert "exists already" in fails(1, "audit", run, "--json", mine)
    assert mine.read_text() == "precious"
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint yet" in fails(1, "audit", run)

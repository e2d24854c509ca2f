import getpass
import json
import platform
from pathlib import Path

import torch

import longshort
from longshort.cli import main


def test_doctor_reports(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "blockwise" in shown


def test_doctor_takes_no_flags(fails):
    assert "doctor takes no flags but --json, got --deep" in fails(2, "doctor", "--deep")


def test_doctor_reports_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    shown = capsys.readouterr().out
    facts = json.loads(shown)
    assert list(facts) == [
        "format", "longshort", "python", "torch", "packages", "missing_extras", "system", "cpu", "kernels",
        "gpus", "backends",
    ]  # fmt: skip
    assert facts["longshort"] == longshort.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["kernels"]["built"] == (facts["kernels"]["reason"] is None)
    assert all(backend["chosen"] in ("cpu", "triton") for backend in facts["backends"])
    for private in (str(Path.home()), str(Path.cwd()), platform.node(), f'"{getpass.getuser()}"'):
        assert private not in shown

import pytest
from tests.studies.in_process import run_here
from tests.terminals import Terminal

from longshort.cli import main
from longshort.cli.study import StudyDisplay, describe_time
from longshort.studies import catalogue
from longshort.studies.framework.runner import Running, State
from longshort.studies.framework.study import Trial


def test_a_study_ends_with_its_verdicts_and_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(catalogue, "run_trials", run_here)
    out = tmp_path / "out"
    assert main(["study", "latency", "--scale", "smoke", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "latency: n = 64, seed 0 done in" in shown
    assert "F6, T1: " in shown
    assert str(out / "report.html") in shown.replace("\n", "")
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explosions"], "NAME must be one of"),
        (["all", "--seeds", "0"], "--seeds must be an integer >= 1, got 0"),
        ([], "NAME"),
        (["all", "--scale", "desktop"], "smoke"),
    ],
)
def test_bad_arguments_touch_nothing(fails, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(2, "study", *arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "time left not known yet"),
        (-3.0, "about 0 s left"),
        (40.0, "about 40 s left"),
        (600.0, "about 10 minutes left"),
    ],
)
def test_time_left(seconds, text):
    assert describe_time(seconds) == text


def test_the_live_table_shows_what_runs():
    from rich.console import Console

    output = Console(force_terminal=True, width=100, record=True, file=Terminal())
    trial = Trial("MHSA", 2, {"train": {"learning_rate": 3e-3}})
    with StudyDisplay(output) as display:
        display.on_state(
            State({"explosion": 3}, {"explosion": 9}, [Running("explosion", trial, 0.25)], 120.0)
        )
    shown = output.export_text()
    for part in ("3 of 9 trials", "MHSA, seed 2, rate 0.003", "25%", "about 2 minutes left"):
        assert part in shown

import io

import pytest
from rich.console import Console
from tests.terminals import Terminal

from longshort.cli import demo
from longshort.studies.demo import MODELS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out"),
        (["--out", "d", "--steps", "0"], "--steps"),
        (["--out", "d", "--steps", "few"], "few"),
        (["--out", "d", "--tokens-per-step", "1000"], "--tokens-per-step must be a multiple"),
    ],
    ids=str,
)
def test_wrong_usage(fails, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(2, "demo", *flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_a_failure(fails, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert "--overwrite" in fails(1, "demo", "--out", tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def show_training(output):
    with demo.DemoDisplay(output, steps=10) as display:
        display.on_stage("training")
        for step in (5, 10):
            for name in MODELS:
                display.on_training(name, step, {"loss": 2.5, "max_logit": 16.0, "tokens_per_second": 1234.0})


def test_a_terminal_shows_both_models_as_bars():
    terminal = Terminal()
    show_training(Console(file=terminal, force_terminal=True, width=140))
    shown = terminal.getvalue()
    assert all(name in shown for name in MODELS)
    assert "10/10" in shown
    assert "largest logit 16.0" in shown


def test_elsewhere_there_are_lines_now_and_then(monkeypatch):
    monkeypatch.setattr(demo, "SECONDS_BETWEEN_LINES", 5.0)
    output = io.StringIO()
    show_training(Console(file=output, width=140))
    assert output.getvalue().splitlines() == [
        "training",
        "LS-attention  step 5/10  loss 2.5000  largest logit 16.0  1,234 tokens/s",
        "MHSA          step 5/10  loss 2.5000  largest logit 16.0  1,234 tokens/s",
    ]

import os
import re
import subprocess
import sys

import pytest
from tests.terminals import in_kernel, on_terminal

from longshort.reporting import console

WORK = """
import time
from longshort.reporting import console
console.SECONDS_BETWEEN_LINES = 0.3
with console.progress_bar() as show:
    for done in range(1, 8):
        show("training the tokenizer", done, 7)
        time.sleep(0.1)
"""


def frames(written):
    """The lines that a terminal showed, redrawn ones too, without control sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    return [frame.rstrip() for frame in re.split(r"[\r\n]+", plain) if frame.strip()]


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_gets_a_bar_that_fits(columns):
    shown = frames(on_terminal(WORK, columns))
    assert any(re.match(r"training the tokenizer +(━.* )?.*%", frame) for frame in shown)
    assert any("━" in frame for frame in shown) == (columns == 80)
    assert all(len(frame) <= columns for frame in shown)


def test_a_terminal_without_colour_gets_a_bar_without_colour():
    written = on_terminal(WORK, NO_COLOR="1")
    assert "━" in written
    assert re.findall(r"\x1b\[[0-9;]*m", written) == []


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"JPY_PARENT_PID": "1"}], ids=str)
def test_a_terminal_that_cannot_redraw_gets_lines(variables):
    written = on_terminal(WORK, **variables)
    assert "\x1b" not in written
    assert 1 <= len(frames(written)) <= 3
    assert all(re.fullmatch(r"training the tokenizer: \d+%", frame) for frame in frames(written))


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1", "TERM": "xterm"}], ids=str)
def test_a_log_gets_lines_without_control_characters(variables):
    result = subprocess.run(
        [sys.executable, "-c", WORK],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CI": "true", **variables},
    )
    assert result.stdout == ""
    assert 1 <= len(result.stderr.splitlines()) <= 3
    assert all(re.fullmatch(r"training the tokenizer: \d+%", line) for line in result.stderr.splitlines())


def test_a_notebook_gets_one_line_that_is_replaced():
    (outputs,) = in_kernel(WORK)
    assert [output.output_type for output in outputs] == ["display_data"]
    assert dict(outputs[0].data) == {"text/plain": "training the tokenizer: 100%"}


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, ["reading: 25%", "writing: 1,000"]), (3600.0, [])])
def test_elsewhere_there_are_lines_now_and_then(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", seconds)
    with console.progress_bar() as show:
        show("reading", 1, 4)
        show("writing", 1000, None)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines
    assert captured.out == ""


def test_lines_say_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    clock = iter([0.0, 0.0, 60.0, 570.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress_bar() as show:
        for done in (10, 20, 105):
            show("reading", done, 110)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 9%",
        "reading: 18%, about 9 minutes left",
        "reading: 95%",
    ]

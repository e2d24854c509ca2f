import io

import pytest

from longshort.cli import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress_bar() as show:
        show("reading", 1, 4)
        show("reading", 2, 4)
        show("writing", 10, None)
    assert "reading" in terminal.getvalue() or "writing" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()


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

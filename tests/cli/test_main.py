import subprocess
import sys
from types import SimpleNamespace

import pytest

import longshort
import longshort.cli as cli
from longshort.cli import main

COMMANDS = [name for name in cli.COMMANDS if name != "bench"]  # which has subcommands


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(capsys, flag):
    assert main([flag]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{longshort.__version__}\n"


@pytest.mark.parametrize("command", ["trian", "", "--steps", "../data", "errors", "console"])
def test_an_unknown_command_is_a_usage_error(fails, command):
    message = fails(2, command)
    assert f"there is no command {command!r}" in message
    assert all(name in message for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(capsys, command):
    assert main([command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: longshort {command}")
    assert captured.err == ""


@pytest.mark.parametrize(
    "command",
    [
        "data --out d",
        "train tiny --data d --out r",
        "train --resume r",
        "evaluate r",
        "audit r",
        "generate r",
        "inspect m",
        "convert m o",
        "heal m --data d",
        "watch m --text t",
        "needle m",
        "plan --length 9",
        "doctor",
        "demo --out d",
    ],
)
def test_an_unknown_flag_is_a_usage_error(fails, command):
    assert "--nonsense" in fails(2, *command.split(), "--nonsense")


def raising(monkeypatch, error):
    def run(_arguments):
        raise error

    monkeypatch.setattr(cli, "import_module", lambda _name: SimpleNamespace(run=run))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("window must be at least 1, got 0"), 1, "window must be at least 1, got 0"),
        (OSError(28, "No space left on device", "run/x"), 1, "run/x: No space left on device"),
        (OSError(5, "Input/output error"), 1, "Input/output error"),
        (FileExistsError("run exists already"), 1, "run exists already"),
        (MemoryError(), 1, "out of memory"),
        (KeyError("x"), 1, "KeyError: 'x' (LONGSHORT_DEBUG=1 shows where)"),
        (ValueError(), 1, "ValueError:  (LONGSHORT_DEBUG=1 shows where)"),
        (ModuleNotFoundError("no", name="matplotlib.figure"), 1, "pip install 'longshort[train]'"),
        (ModuleNotFoundError("no", name="transformers"), 1, "transformers: pip install 'longshort[hf]'"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "ModuleNotFoundError: No module named 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (cli.UsageError("not so"), 2, "not so"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_become_messages(monkeypatch, capsys, error, code, message):
    raising(monkeypatch, error)
    assert main(["train"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("longshort: error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_debugging_raises_failures(monkeypatch):
    monkeypatch.setenv("LONGSHORT_DEBUG", "1")
    raising(monkeypatch, ValueError("what"))
    with pytest.raises(ValueError, match="what"):
        main(["train"])


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_the_module_is_the_command():
    result = python("-m", "longshort", "nonsense")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("longshort: error: there is no command 'nonsense'")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["nonsense"]], ids=str)
def test_help_needs_nothing_heavy(arguments):
    code = f"import sys; from longshort.cli import main; main({arguments}); print(*sys.modules)"
    loaded = python("-c", code).stdout.splitlines()[-1].split()
    assert "longshort.cli" in loaded
    assert not {"torch", "tyro", "rich", "transformers", "matplotlib"} & set(loaded)


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "longshort", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141

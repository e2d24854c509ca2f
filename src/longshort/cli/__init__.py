"""The command line: `main` finds the command, calls it, and turns errors into messages and exit codes.

There is one module per command, imported when it is called, so that no command waits for another's imports.
Each has `run(arguments) -> int`, which returns the exit code.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from longshort.checks import is_switched_on
from longshort.cli.errors import UsageError, is_first_of_node
from longshort.extras import MissingPackageError, distribution, install_command

if TYPE_CHECKING:
    from collections.abc import Sequence

_GROUPS = {
    "train and use a model": {
        "data": "Turn text into a folder of tokens.",
        "train": "Train a model, or resume a run.",
        "evaluate": "Measure a trained model on whole validation documents.",
        "generate": "Generate text with a trained model.",
        "needle": "Measure how far back a language model finds what it has read.",
        "audit": "Measure what rounding inside attention does to the gradients of a trained model.",
        "export": "Write a trained model as a folder for from_pretrained.",
    },
    "decoders of Hugging Face": {
        "watch": "Measure the attention logits of a Hugging Face decoder, by layer and head.",
        "inspect": "Find out which heads of a pretrained decoder need distant tokens.",
        "convert": "Write a pretrained decoder with local and global heads, and a report.",
        "heal": "Train a converted decoder for a short time, to regain its loss.",
        "families": "Try what works for each family of Hugging Face decoders.",
    },
    "experiments and costs": {
        "demo": "Train LS-attention and full attention side by side.",
        "study": "Run the paper's experiments: trials, figures, verdicts, one report.",
        "claims": "Print the claims of finished studies as a table in Markdown.",
        "bench": "Measure the speed and memory of attention and of models on this machine.",
        "plan": "Count what layouts of heads would cost: cache, operations, longest context.",
    },
    "this installation": {
        "doctor": "Show versions, hardware, and which attention backends work here.",
        "completion": "Print a script that lets bash, zsh or fish complete commands and flags.",
    },
}
COMMANDS = {name: text for group in _GROUPS.values() for name, text in group.items()}
"""What each command does, by its name, which is also its module."""

_USAGE_LINES = """\
usage: longshort COMMAND [flags]

LS-attention for PyTorch: attention heads split into many short-range and a few long-range ones.

"""
_HELP = (
    _USAGE_LINES
    + "".join(
        f"{title}:\n" + "".join(f"  {name:<12}{text}\n" for name, text in group.items()) + "\n"
        for title, group in _GROUPS.items()
    )
    + "`longshort COMMAND --help` explains a command; `longshort --version` prints the version.\n"
)
_COMMAND_LINES = "commands; `longshort --help` describes them:\n" + "".join(
    f"  {title + ':':<26}{', '.join(group)}\n" for title, group in _GROUPS.items()
)

_FAILURE, _USAGE, _INTERRUPTED, _BROKEN_PIPE = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: command and flags; None: those of the program.

    Returns:
        0; 1 after a failure; 2 if the command or a flag is wrong; 130 after Ctrl-C. Errors are printed to
        stderr; with LONGSHORT_DEBUG=1 in the environment failures are raised instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # the parser of flags, after --help or its own message
        return stop.code if isinstance(stop.code, int) else _FAILURE
    except UsageError as error:
        return _report_error(str(error), _USAGE) if is_first_of_node() else _USAGE
    except KeyboardInterrupt as interrupt:
        return _report_error(". ".join(["interrupted", *_notes(interrupt)]), _INTERRUPTED)
    except BrokenPipeError:
        from longshort.reporting.stdout import discard_output

        discard_output()
        return _BROKEN_PIPE
    except Exception as error:
        if is_switched_on("LONGSHORT_DEBUG"):
            raise
        return _report_error(". ".join([_describe(error), *_notes(error)]), _FAILURE)


def _run(arguments: list[str]) -> int:
    if not arguments:
        from longshort.cli.welcome import next_steps

        print(f"{_USAGE_LINES}{_COMMAND_LINES}\n{next_steps(Path())}", end="")
        return 0
    command, *rest = arguments
    if command in ("-h", "--help"):
        from longshort.cli.welcome import FIRST_STEPS

        print(f"{_HELP}\n{FIRST_STEPS}", end="")
        return 0
    if command == "--version":
        from longshort import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        raise UsageError(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}")
    return import_module(f"longshort.cli.{command}").run(rest)


def _report_error(message: str, code: int) -> int:
    print(f"longshort: error: {message}", file=sys.stderr)
    return code


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _describe(error: Exception) -> str:
    if isinstance(error, MissingPackageError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (command := install_command(error.name or "")):
        return f"this needs {distribution(error.name or '')}: {command}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, (ValueError, TypeError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (LONGSHORT_DEBUG=1 shows where)"

"""The command line: `main` finds the command, calls it, and turns errors into messages and exit codes.

There is one module per command, imported when it is called, so that no command waits for another's imports.
Each has `run(arguments) -> int`, which returns the exit code.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from longshort.cli.errors import UsageError, is_first_of_node

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "data": "Turn text into a folder of tokens.",
    "train": "Train a model, or resume a run.",
    "evaluate": "Measure a trained model on whole validation documents.",
    "audit": "Measure what rounding inside attention does to the gradients of a trained model.",
    "export": "Write a trained model as a folder for from_pretrained.",
    "generate": "Generate text with a trained model.",
    "families": "Try what works for each family of Hugging Face decoders.",
    "watch": "Measure the attention logits of a Hugging Face decoder, by layer and head.",
    "inspect": "Find out which heads of a pretrained decoder need the distance.",
    "convert": "Write a pretrained decoder with local and global heads, and a report.",
    "heal": "Train a converted decoder for a short time, to regain its loss.",
    "needle": "Measure how far back a language model finds what it has read.",
    "plan": "Count what layouts of heads would cost: cache, operations, longest context.",
    "bench": "Measure the speed and memory of attention and of models on this machine.",
    "study": "Run the paper's experiments: trials, figures, verdicts, one report.",
    "claims": "Print the claims of finished studies as a table in Markdown.",
    "doctor": "Show versions, hardware, and which attention backends work here.",
    "demo": "Train LS-attention and full attention side by side.",
}
_HELP = """\
usage: longshort COMMAND [flags]

LS-attention for PyTorch: attention heads split into many short-range and a few long-range ones.

commands:
{commands}

`longshort COMMAND --help` explains a command; `longshort --version` prints the version.

example:
  longshort data stdlib --out data
  longshort train tiny --data data --out run
  longshort evaluate run
  longshort generate run --prompt "def "
""".format(commands="\n".join(f"  {name:<10}{text}" for name, text in _COMMANDS.items()))

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
        from longshort.cli.console import discard_output

        discard_output()
        return _BROKEN_PIPE
    except Exception as error:
        if os.environ.get("LONGSHORT_DEBUG", "0") not in ("", "0"):
            raise
        return _report_error(". ".join([_describe(error), *_notes(error)]), _FAILURE)


def _run(arguments: list[str]) -> int:
    if not arguments:
        print(_HELP, end="", file=sys.stderr)
        return _USAGE
    command, *rest = arguments
    if command in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        from longshort import __version__

        print(__version__)
        return 0
    if command not in _COMMANDS:
        raise UsageError(f"there is no command {command!r}; the commands are {', '.join(_COMMANDS)}")
    return import_module(f"longshort.cli.{command}").run(rest)


def _report_error(message: str, code: int) -> int:
    print(f"longshort: error: {message}", file=sys.stderr)
    return code


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        from longshort.doctor import OPTIONAL_PACKAGES

        package = (error.name or "").partition(".")[0]
        if package in OPTIONAL_PACKAGES:
            return f"this needs {package}: pip install 'longshort[{OPTIONAL_PACKAGES[package]}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, (ValueError, TypeError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (LONGSHORT_DEBUG=1 shows where)"

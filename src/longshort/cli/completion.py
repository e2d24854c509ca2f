"""The command `longshort completion`, which prints the script that a shell needs to complete the others.

shtab writes the script from a parser of argparse. That parser is built here from the dataclasses whose flags
tyro parses; the script is static, so that no completion waits for Python.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from argparse import ArgumentParser
from dataclasses import Field, dataclass, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import shtab
import tyro

from longshort.checks import flag
from longshort.cli import COMMANDS
from longshort.cli.bench import BENCHMARKS, benchmark_kind
from longshort.cli.flags import parse
from longshort.model import PRESETS
from longshort.studies.catalogue import STUDIES

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLAGS = {
    "data": ["data.DataFlags"],
    "train": ["train.TrainFlags", "train.ResumeFlags"],
    "evaluate": ["evaluate.EvaluateFlags"],
    "generate": ["generate.GenerateFlags"],
    "needle": ["needle.NeedleFlags"],
    "audit": ["audit.AuditFlags"],
    "export": ["export.ExportFlags"],
    "watch": ["watch.WatchFlags"],
    "inspect": ["inspect.InspectFlags"],
    "convert": ["convert.ConvertFlags"],
    "heal": ["heal.HealFlags"],
    "families": ["families.FamiliesFlags"],
    "demo": ["demo.DemoSettings"],
    "study": ["study.StudyFlags"],
    "claims": ["claims.ClaimsFlags"],
    "plan": ["plan.PlanFlags", "plan_training.TrainingPlanFlags", "plan_paper_runs.PaperRunsFlags"],
    "completion": ["completion.CompletionFlags"],
}
"""The dataclasses of each command's flags, by their module in longshort.cli."""


_NAMES = {"preset": PRESETS, "name": (*STUDIES, "all")}
"""The usual values of flags that take other strings too."""
_PATHS = {"data", "model", "source", "text", "tokenizer"}
"""Flags whose strings may be paths."""


@dataclass(frozen=True)
class CompletionFlags:
    """Print a script that lets a shell complete longshort's commands, flags, choices and files.

    Write it to a file, once and after each update, and load it from there:

    bash: longshort completion bash > ~/.longshort.bash, and in ~/.bashrc the line: source ~/.longshort.bash

    zsh: longshort completion zsh > ~/.zfunc/_longshort, and in ~/.zshrc, before compinit: fpath+=~/.zfunc

    fish: longshort completion fish > ~/.config/fish/completions/longshort.fish
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """Shell that is to read the script."""


def run(arguments: list[str]) -> int:
    flags = parse(CompletionFlags, "completion", arguments)
    print(shtab.complete(command_parser(), shell=flags.shell))
    return 0


def command_parser() -> ArgumentParser:
    """Build a parser that knows all commands, flags and choices, for completion alone."""
    parser = ArgumentParser("longshort")
    parser.add_argument("--version", action="store_true", help="Print the version.")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        _add_flags(command, *(_dataclass(place) for place in _FLAGS.get(name, ())))
        if name == "doctor":
            command.add_argument("--json", action="store_true", help="Print JSON.")
        if name == "bench":
            benchmarks = command.add_subparsers()
            for benchmark, description in BENCHMARKS.items():
                _add_flags(benchmarks.add_parser(benchmark, help=description), benchmark_kind(benchmark))
    return parser


def _dataclass(place: str) -> type:
    module, _, name = place.partition(".")
    return getattr(import_module(f"longshort.cli.{module}"), name)


def _add_flags(parser: ArgumentParser, *kinds: type) -> None:
    """Add the fields of dataclasses to a parser, each name once."""
    known: set[str] = set()
    for kind in kinds:
        hints, texts = get_type_hints(kind, include_extras=True), _docstrings(kind)
        for field in fields(kind):
            if field.name not in known:
                known.add(field.name)
                _add_flag(parser, field, hints[field.name], texts.get(field.name, ""))


def _add_flag(parser: ArgumentParser, field: Field[Any], hint: Any, text: str) -> None:
    name = field.name
    parts = list(_parts(hint))
    is_positional = tyro.conf.Positional in get_args(hint)
    options: dict[str, Any] = {"help": text}
    if bool in parts:
        name = flag(f"no_{name}" if field.default is True else name)
        parser.add_argument(name, action="store_true", **options)
        return
    choices = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
    choices = choices or list(_NAMES.get(name, ()))
    if any(get_origin(part) is tuple for part in parts):
        options["nargs"] = "*"
    elif is_positional:
        options["nargs"] = "?"
    action = parser.add_argument(name if is_positional else flag(name), choices=choices or None, **options)
    if not choices and (Path in parts or is_positional or name in _PATHS):
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _parts(hint: Any) -> Iterator[Any]:
    """Yield an annotation and all that it is made of."""
    yield hint
    if get_origin(hint) is not Literal:
        inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
        for part in inner:
            yield from _parts(part)


def _docstrings(kind: type) -> dict[str, str]:
    """Return the first sentence of what is written below each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in pairwise(body.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                sentence, _, _ = " ".join(str(below.value.value).split()).partition(". ")
                found[field.target.id] = sentence.removesuffix(".") + "."
    return found

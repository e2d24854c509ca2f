"""The public names of longshort, with their signatures, and its commands, with their flags, are those of
tests/public_api.txt; `python tests/test_public_api.py --write` renews it.

The listing is the same with every supported Python, torch and transformers: annotations are as they are
written, and members are those that longshort itself defines.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, ForwardRef, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import tyro

import longshort
from longshort.cli import main

LISTING = Path(__file__).with_name("public_api.txt")
RENEW = "python tests/test_public_api.py --write"
MODULES = (
    "longshort",
    "longshort.cache",
    "longshort.data",
    "longshort.distributed",
    "longshort.evaluation",
    "longshort.huggingface",
    "longshort.huggingface.callbacks",
    "longshort.huggingface.spike_callback",
    "longshort.model",
    "longshort.stability",
    "longshort.training",
)
"""The public modules, those that docs/policy.md names; each lists its public names in `__all__`."""
OTHER_FORMS = {"train": ["--resume"], "plan": ["--ranks", "--paper-runs"]}
"""Flags with which a command takes other flags."""


class Written(str):
    """A text that signatures show without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def listing() -> list[str]:
    lines = [line for module in MODULES for line in module_lines(module)]
    return lines + [line for command in commands() for line in command_lines(command)]


def module_lines(module: str) -> Iterator[str]:
    for name in sorted(import_module(module).__all__):
        value = getattr(import_module(module), name)
        if values := next(choices(value), None):
            yield f"{module}.{name} = {{{', '.join(map(repr, values))}}}"
        elif inspect.isclass(value):
            yield from class_lines(f"{module}.{name}", value)
        elif callable(value):
            yield f"{module}.{name}{signature(value)}"
        else:
            yield f"{module}.{name} = {constant(value)}"


def class_lines(path: str, kind: type) -> Iterator[str]:
    yield f"class {path}{constructor(kind)}"
    own = [base for base in kind.__mro__ if is_own(base)]
    members: dict[str, str] = {}
    for base in reversed(own):
        for name, annotation in inspect.get_annotations(base).items():
            if not dataclasses.is_dataclass(kind) or "ClassVar" in text_of(annotation):
                members[name] = f": {text_of(annotation)}"
        for name, member in vars(base).items():
            if (shown := describe(member)) is not None:
                members[name] = shown
    for name in sorted(members):
        if not name.startswith("_") or re.fullmatch("__(?!init|post_init|new|repr).*__", name):
            yield f"{path}.{name}{members[name]}"


def constructor(kind: type) -> str:
    """The signature of a class, without the fields that its bases in other packages define."""
    made_by = next(base for base in kind.__mro__ if {"__init__", "__new__"} & vars(base).keys())
    if not is_own(made_by) or is_protocol(kind):
        return ""
    if not dataclasses.is_dataclass(kind):
        return signature(kind).removesuffix(" -> None")
    fields = {name for base in kind.__mro__ if is_own(base) for name in inspect.get_annotations(base)}
    return signature(kind, {name for name in fields if not name.startswith("_")}).removesuffix(" -> None")


def describe(member: Any) -> str | None:
    """What the listing says of a member of a class; None if longshort has not written it."""
    if isinstance(member, property):
        return f": {signature(member.fget).partition(' -> ')[2]}"
    if isinstance(member, cached_property):
        return f": {signature(member.func).partition(' -> ')[2]}"
    function = getattr(member, "__func__", member)  # of a class method or a static method
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, FunctionType) or not is_own_file(function.__code__.co_filename):
        return None
    return signature(getattr(member, "__func__", member))


def is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "longshort"


def is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def is_own_file(path: str) -> bool:
    return Path(path).is_relative_to(Path(longshort.__file__).parent)


def signature(function: Any, only: set[str] | None = None) -> str:
    found = inspect.signature(function)
    parameters = [
        parameter.replace(
            annotation=written(parameter.annotation, text_of), default=written(parameter.default, constant)
        )
        for parameter in found.parameters.values()
        if only is None or parameter.name in only
    ]
    returned = written(found.return_annotation, text_of)
    return str(found.replace(parameters=parameters, return_annotation=returned))


def written(value: Any, show: Callable[[Any], str]) -> Any:
    return value if value is inspect.Parameter.empty else Written(show(value))


def text_of(annotation: Any) -> str:
    """An annotation as it is written; those of named tuples are strings no more."""
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation


def constant(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(repr, value))}}}"
    if callable(value):
        return value.__qualname__
    shown = repr(value)
    assert " at 0x" not in shown, shown
    return shown


def commands() -> list[list[str]]:
    """Each command, and each benchmark, as its arguments."""
    names = [[name] for name in listed("--help") if name != "bench"]
    forms = [[name, flag] for name, flags in OTHER_FORMS.items() for flag in flags]
    return sorted([*names, *(["bench", name] for name in listed("bench", "--help")), *forms])


def listed(*arguments: str) -> list[str]:
    return re.findall(r"^  ([a-z]+)  +[A-Z]", printed(*arguments), re.MULTILINE)


def printed(*arguments: str) -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        main(arguments)
    return output.getvalue()


def command_lines(command: list[str]) -> list[str]:
    """A line for each flag of a command, from the settings that it parses its arguments into."""
    parsed: list[type] = []

    def remember(kind: type, **_: Any) -> None:
        parsed.append(kind)
        raise SystemExit

    path = f"longshort {' '.join(command)}"
    with mock.patch.object(tyro, "cli", remember):
        text = printed(*command, "--help")
    if not parsed:  # a command without settings: its help is its own
        flags = sorted(set(re.findall(r"--[a-z-]+", text)) - {"--help"})
        return [" ".join([path, *flags])]
    hints = get_type_hints(parsed[0], include_extras=True)
    return [f"{path} {flag(field, hints[field.name])}" for field in dataclasses.fields(parsed[0])]


def flag(field: dataclasses.Field[Any], hint: Any) -> str:
    name = field.name.replace("_", "-")
    if tyro.conf.Positional in get_args(hint):
        shown = name.upper()
    else:
        shown = f"--no-{name}" if field.default is True else f"--{name}"
    chosen = "".join(f" {{{','.join(map(str, values))}}}" for values in choices(hint))
    if field.default is not dataclasses.MISSING:
        return f"{shown}{chosen} = {constant(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f"{shown}{chosen} = {constant(field.default_factory())}"
    return f"{shown}{chosen}"


def choices(hint: Any) -> Iterator[tuple[Any, ...]]:
    if get_origin(hint) is Literal:
        yield get_args(hint)
    else:
        for part in get_args(hint):
            yield from choices(part)


def test_the_public_names_and_flags_are_those_that_are_listed() -> None:
    difference = "\n".join(
        difflib.unified_diff(
            LISTING.read_text().splitlines(), listing(), "tests/public_api.txt", "the code", lineterm="", n=0
        )
    )
    assert not difference, f"{difference}\n{RENEW} renews the listing; docs/policy.md says what may change"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {RENEW}")
    LISTING.write_text("".join(f"{line}\n" for line in listing()))

"""Argument checks: each raises an error that names the argument, the value given and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from numbers import Integral
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def is_switched_on(variable: str) -> bool:
    """Return whether an environment variable that is a switch is set, and neither empty nor 0."""
    return os.environ.get(variable, "0") not in ("", "0")


def require_integer(name: str, value: Any, minimum: int) -> None:
    """Raise a ValueError that names the argument unless value is an integer (not a bool) >= minimum."""
    _require_number(name, value, Integral, "an integer", [("ge", minimum)])


def require_positive(name: str, value: Any) -> None:
    """Raise a ValueError that names the argument unless value is a finite number > 0."""
    _require_number(name, value, int | float, "a finite number", [("gt", 0)])


def is_finite(value: Any) -> bool:
    """Return whether value is a number, neither a bool nor infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flag(field: str) -> str:
    """Return the command-line flag of a setting: batch_size -> --batch-size."""
    return "--" + field.replace("_", "-")


def check_fields(settings: Any, named: Callable[[str], str] = flag) -> None:
    """Check the fields of a dataclass against their annotations.

    Checked are `bool`, `int`, `float` (finite; an int is accepted), `Literal`, each of them `| None`, and
    tuples of these; other types pass. Bounds are those of annotated-types, such as `Annotated[int, Ge(1)]`.

    Args:
        settings: an instance of the dataclass.
        named: gives the name of a field in messages; by default its command-line flag.

    Raises:
        ValueError: a value does not fit.
    """
    hints = _hints(type(settings))
    for field in type(settings).__dataclass_fields__:
        _check(named(field), getattr(settings, field), hints[field], [])


@cache  # it takes most of a millisecond, and studies make tens of thousands of settings
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


_COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", lambda value, bound: value >= bound),
    "gt": (">", lambda value, bound: value > bound),
    "le": ("<=", lambda value, bound: value <= bound),
    "lt": ("<", lambda value, bound: value < bound),
}
"""The sign and the meaning of each bound, by the name of its attribute in annotated-types."""


def _check(name: str, value: Any, hint: Any, bounds: list[tuple[str, Any]]) -> None:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        found = [
            (key, getattr(item, key)) for item in arguments[1:] for key in _COMPARISONS if hasattr(item, key)
        ]
        _check(name, value, arguments[0], found)
    elif kind in (Union, UnionType):
        others = [option for option in arguments if option is not NoneType]
        if value is not None and len(others) == 1:
            _check(name, value, others[0], bounds)
    elif kind is tuple:
        for entry in value:
            _check(name, entry, arguments[0], bounds)
    elif kind is Literal:
        if value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    elif hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    elif hint is int:
        _require_number(name, value, Integral, "an integer", bounds)
    elif hint is float:
        _require_number(name, value, int | float, "a number", bounds)


def _require_number(name: str, value: Any, kind: Any, words: str, bounds: list[tuple[str, Any]]) -> None:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    is_number = is_number and (isinstance(value, Integral) or math.isfinite(value))
    if not is_number or not all(_COMPARISONS[key][1](value, bound) for key, bound in bounds):
        allowed = " and ".join(f"{_COMPARISONS[key][0]} {_in_words(bound)}" for key, bound in bounds)
        raise ValueError(f"{name} must be {words} {allowed}".rstrip() + f", got {value!r}")


def _in_words(bound: Any) -> str:
    return "2**63" if bound == 2**63 else str(bound)

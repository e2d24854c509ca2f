"""Checks of arguments, and of settings against their annotations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt

from longshort.checks import check_fields, is_finite, require_integer, require_positive


@dataclass(frozen=True)
class Settings:
    anything: Path | None = None
    count: Annotated[int, Ge(1)] = 1
    share: Annotated[float, Ge(0), Lt(1)] = 0.0
    rate: Annotated[float, Gt(0)] | None = None
    free: float = 0.0
    whole: int = 0
    switch: bool = False
    perhaps: bool | None = None
    kind: Literal["a", "b"] = "a"
    sizes: tuple[Annotated[int, Ge(1), Le(9)], ...] = (1,)


@dataclass(frozen=True)
class More(Settings):
    two_words: Annotated[int, Ge(2)] | None = None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"anything": 3},  # types that are not looked at
        {"count": 5, "share": 0, "rate": 1e-9, "free": -1.5, "whole": -7},
        {"perhaps": True, "kind": "b", "sizes": (1, 9), "two_words": 2},
        {"sizes": ()},
    ],
    ids=str,
)
def test_what_fits_passes(values: dict[str, Any]) -> None:
    check_fields(More(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--count must be an integer >= 1, got 0"),
        ({"count": 1.0}, "--count must be an integer >= 1, got 1.0"),
        ({"count": True}, "--count must be an integer >= 1, got True"),
        ({"count": None}, "--count must be an integer >= 1, got None"),
        ({"share": 1}, "--share must be a number >= 0 and < 1, got 1"),
        ({"share": float("nan")}, "--share must be a number >= 0 and < 1, got nan"),
        ({"rate": 0}, "--rate must be a number > 0, got 0"),
        ({"rate": "1"}, "--rate must be a number > 0, got '1'"),
        ({"free": float("inf")}, "--free must be a number, got inf"),
        ({"whole": 0.5}, "--whole must be an integer, got 0.5"),
        ({"switch": None}, "--switch must be True or False, got None"),
        ({"perhaps": 1}, "--perhaps must be True or False, got 1"),
        ({"kind": "c"}, "--kind must be one of a, b, got 'c'"),
        ({"sizes": (1, 10)}, "--sizes must be an integer >= 1 and <= 9, got 10"),
        ({"two_words": 1}, "--two-words must be an integer >= 2, got 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_fields(More(**values))
    assert str(error.value) == message


def test_names_may_be_those_of_the_fields() -> None:
    with pytest.raises(ValueError, match=r"^two_words must be"):
        check_fields(More(two_words=0), named=str)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda name, value: require_integer(name, value, minimum=3), 2, "x must be an integer >= 3, got 2"),
        (
            lambda name, value: require_integer(name, value, minimum=3),
            True,
            "x must be an integer >= 3, got True",
        ),
        (require_positive, 0.0, "x must be a finite number > 0, got 0.0"),
        (require_positive, float("inf"), "x must be a finite number > 0, got inf"),
        (require_positive, float("nan"), "x must be a finite number > 0, got nan"),
    ],
)
def test_arguments_are_refused_by_name(check: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check("x", value)
    assert str(error.value) == message


def test_integers_may_be_of_any_size() -> None:
    require_integer("x", 10**400, minimum=1)
    check_fields(Settings(count=10**400))
    with pytest.raises(ValueError, match="x must be an integer >= 1, got -1000"):
        require_integer("x", -(10**400), minimum=1)


def test_what_is_finite() -> None:
    assert is_finite(0) and is_finite(-1.5)
    assert not any(is_finite(value) for value in (True, float("nan"), float("inf"), "1", None))

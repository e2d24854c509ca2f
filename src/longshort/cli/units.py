"""Readable sizes and counts."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def parse_bytes(name: str, text: str) -> int:
    """Parse a text such as "4GiB", "512 MB" or "1e9" as a number of bytes.

    Raises:
        ValueError: the text is not a size, or is less than one byte; the message starts with `name`.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{0,15})?(?:e[0-9]{1,2})?)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        units = ", ".join(filter(None, _UNITS))
        raise ValueError(f"{name} must be a size such as 4GiB, in one of {units}, got {text!r}")
    return size


def format_bytes(size: int) -> str:
    """Format bytes with three digits and a binary unit."""
    return _three_digits(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_count(count: int) -> str:
    """Format a count with three digits and a metric unit."""
    return _three_digits(count, 1000, ("", "k", "M", "G", "T", "P")).rstrip()


def format_seconds(seconds: float) -> str:
    """Format seconds with three digits, in s, ms or us."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 0.9995:
            return f"{_digits(seconds * factor)} {unit}"
    return "< 1 us" if seconds else "0 s"


def _digits(value: float) -> str:
    """Format a number with three digits, or whole if it has more."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _three_digits(size: int, step: int, units: tuple[str, ...]) -> str:
    """Format a size in the smallest unit in which it has at most three digits, or in the largest unit."""
    value, unit = float(size), units[0]
    for larger in units[1:]:
        if value < 999.5:  # 999.5 would be rounded to four digits
            break
        value, unit = value / step, larger
    return f"{_digits(value)} {unit}"

"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def parse_bytes(name: str, text: str) -> int:
    """Bytes that a text such as "4GiB", "512 MB" or "1e9" means.

    Raises:
        ValueError: it means none, or less than one; the message names what was to be set.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{0,15})?(?:e[0-9]{1,2})?)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        units = ", ".join(filter(None, _UNITS))
        raise ValueError(f"{name} must be a size such as 4GiB, in one of {units}, got {text!r}")
    return size


def format_bytes(size: int) -> str:
    """Three digits and a binary unit."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def format_count(count: int) -> str:
    """Three digits and a metric unit."""
    value, unit = float(count), ""
    for larger in ("k", "M", "G", "T", "P"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}".rstrip()

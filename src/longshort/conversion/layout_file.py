"""Files with the layouts of a model's layers, as `longshort inspect` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longshort.layout import HeadLayout
from longshort.reporting.files import replace_file, strict_json

FORMAT = "longshort layouts 1"


def write_layouts(
    path: Path, layouts: Sequence[HeadLayout | None], about: Mapping[str, Any] | None = None
) -> None:
    """Write layouts as JSON; an old file is replaced.

    Args:
        path: the file.
        layouts: one per layer, None where a layer does not attend.
        about: further entries, for people and for other programs.

    Raises:
        OSError: the file cannot be written.
    """
    entries = [
        None
        if layout is None
        else {
            "windows": list(layout.windows),
            "num_kv_heads": layout.num_kv_heads,
            "sink_tokens": layout.sink_tokens,
        }
        for layout in layouts
    ]
    replace_file(path, strict_json({"format": FORMAT, "layouts": entries, **(about or {})}).encode())


def read_layouts(path: Path) -> list[HeadLayout | None]:
    """Read the layouts of a file that `write_layouts` wrote, or somebody by hand.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no file of layouts; the message names the layer.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be a file of layouts, got no JSON: {error}") from None
    entries = content.get("layouts") if isinstance(content, dict) else None
    if not isinstance(entries, list) or content.get("format") != FORMAT:
        raise ValueError(f"{path} must have the format {FORMAT!r} and a list 'layouts', one entry per layer")
    return [_layout(entry, f"{path}, layer {layer}") for layer, entry in enumerate(entries)]


def _layout(entry: Any, where: str) -> HeadLayout | None:
    if entry is None:
        return None
    wanted = {"windows", "num_kv_heads", "sink_tokens"}
    if not isinstance(entry, dict) or entry.keys() != wanted:
        raise ValueError(f"{where}: must be null or have {', '.join(sorted(wanted))}, got {entry!r}")
    try:
        return HeadLayout(entry["windows"], entry["num_kv_heads"], entry["sink_tokens"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

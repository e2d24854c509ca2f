"""Tables of commands: a column of names, then columns of numbers."""

from __future__ import annotations

from rich.table import Table


def plain_table(name: str, *columns: str) -> Table:
    """Make a table without lines whose first column holds names, and the others numbers."""
    table = Table(box=None)
    table.add_column(name)
    for column in columns:
        table.add_column(column, justify="right")
    return table

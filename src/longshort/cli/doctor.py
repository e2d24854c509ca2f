"""The command `longshort doctor`, which needs no extra, since it reports missing ones."""

from __future__ import annotations

from longshort.cli.errors import UsageError


def run(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print("usage: longshort doctor\n\nShow versions, hardware, and which attention backends work here.")
        return 0
    if arguments:
        raise UsageError(f"doctor takes no flags, got {' '.join(arguments)}")
    from longshort.doctor import as_text, report

    print(as_text(report()))
    return 0

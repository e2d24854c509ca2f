"""The error of commands that are called in a wrong way."""

import os


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


def is_first_of_node() -> bool:
    """Return whether this process prints what all processes find that torchrun started on a machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"

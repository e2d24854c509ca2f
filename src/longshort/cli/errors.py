"""The error of commands that are called in a wrong way."""


class UsageError(Exception):
    """The command line is wrong: exit code 2."""

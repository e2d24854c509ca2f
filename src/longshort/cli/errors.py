"""What a command raises when its call, not its work, is wrong."""


class UsageError(Exception):
    """The command cannot be what the user meant: exit code 2."""

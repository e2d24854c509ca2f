"""Handling of a closed stdout. It needs no rich, unlike `console`, since `longshort doctor` works without."""

import os
import sys


def discard_output() -> None:
    """Discard stdout once its reader is gone, so that flushing its buffer at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

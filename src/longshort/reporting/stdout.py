"""A stdout whose reader has gone, apart from `console` and its need of rich: `longshort doctor` has none."""

import os
import sys


def discard_output() -> None:
    """Discard stdout once its reader is gone, so that flushing its buffer at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

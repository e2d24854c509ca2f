"""What is left of stdout when its reader has gone. Needs no extra, as `longshort doctor | head` does not."""

import os
import sys


def discard_output() -> None:
    """Discard stdout once its reader is gone, so that flushing its buffer at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

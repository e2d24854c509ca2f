"""The entry point of `python -m longshort`, which is the same as `longshort`."""

import sys

from longshort.cli import main

sys.exit(main())

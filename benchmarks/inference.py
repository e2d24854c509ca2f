"""Speed and memory of whole models: `longshort bench prefill`, `decode` and `memory`, under another name.

python benchmarks/inference.py prefill --lengths 2048 8192 --out prefill.csv
"""

from __future__ import annotations

import sys

from longshort.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

"""Speed of attention: `longshort bench attention`, under another name.

python benchmarks/attention.py --lengths 2048 8192 --out attention.csv
"""

from __future__ import annotations

import sys

from longshort.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))

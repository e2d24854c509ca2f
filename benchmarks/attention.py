"""Time of attention, provider × length, interleaved in one run, as a CSV and a table of medians.

    python benchmarks/attention.py --lengths 2048 8192 --out attention.csv

The baseline is SDPA with every head global. GFLOP/s count the work on visible pairs alone: 4·head_dim
operations a pair forward, 14·head_dim forward and backward.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from longshort import HeadLayout, attention

BASELINE = "sdpa, all heads global"
ROW_FIELDS = ["pass", "provider", "length", "milliseconds", "speedup", "gflops"]


def providers(layout: HeadLayout) -> dict[str, tuple[HeadLayout, Callable]]:
    """By name: the layout that a provider computes, and the function of q, k, v that does it."""
    every_head_global = HeadLayout((None,) * layout.num_heads)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def blockwise(q, k, v):
        return attention(q, k, v, layout, backend="blockwise")

    def blockwise_with_statistics(q, k, v):
        return attention(q, k, v, layout, backend="blockwise", return_stats=True)[0]

    return {
        BASELINE: (every_head_global, sdpa),
        "blockwise": (layout, blockwise),
        "blockwise with statistics": (layout, blockwise_with_statistics),
    }


def measure(length: int, args: argparse.Namespace) -> list[dict]:
    """One row per provider and pass, medians over interleaved repeats of CPU time."""
    layout = HeadLayout.split(args.heads, args.global_heads, args.window)
    shape = (args.batch, args.heads, length, args.head_dim)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    grad_out = torch.randn(shape)

    def forward(function: Callable) -> None:
        with torch.no_grad():
            function(q, k, v)

    def forward_and_backward(function: Callable) -> None:
        torch.autograd.grad(function(q, k, v), (q, k, v), grad_out)

    passes = {"forward": (forward, 4), "forward + backward": (forward_and_backward, 14)}
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(args.repeats + 1):
        for name, (_, function) in providers(layout).items():
            for pass_name, (run, _) in passes.items():
                start = time.process_time()
                run(function)
                if repeat:  # the first round warms up
                    times.setdefault((pass_name, name), []).append(time.process_time() - start)
    rows = []
    for (pass_name, name), seconds in times.items():
        computed_layout = providers(layout)[name][0]
        pairs = args.batch * computed_layout.score_count(length, length)
        median = statistics.median(seconds)
        rows.append(
            {
                "pass": pass_name,
                "provider": name,
                "length": length,
                "milliseconds": round(1e3 * median, 2),
                "speedup": round(statistics.median(times[pass_name, BASELINE]) / median, 2),
                "gflops": round(passes[pass_name][1] * args.head_dim * pairs / median / 1e9, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--global-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU time is summed over threads")
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print(f"# torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads")
    rows = []
    writer = csv.DictWriter(sys.stdout, ROW_FIELDS)
    writer.writeheader()
    for length in args.lengths:
        for row in measure(length, args):
            writer.writerow(row)
            rows.append(row)
    if args.out:
        with args.out.open("w", newline="") as file:
            to_file = csv.DictWriter(file, ROW_FIELDS)
            to_file.writeheader()
            to_file.writerows(rows)


if __name__ == "__main__":
    main()

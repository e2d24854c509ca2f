"""Time of projections of a few tokens: `project`, which splits the rows over threads, against nn.Linear.

    python benchmarks/projection.py --threads 2

All matrices of 12 layers of the preset paper-base are used in turn, so that none is found in the processor's
cache. Medians of interleaved rounds of wall time; GB/s count the weights once.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from longshort.bench.benchmarking import processor_name
from longshort.projection import project

_SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layers = [nn.Linear(*shape, bias=False) for _ in range(12) for shape in _SHAPES]
    size = sum(layer.weight.nbytes for layer in layers)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"# {processor_name()}, {capability}, torch {torch.__version__}, {args.threads} threads")
    print(f"{'tokens':>6}{'nn.Linear ms':>14}{'project ms':>15}{'times faster':>14}{'GB/s':>7}")
    for tokens in (1, 2, 4, 8, 16):
        inputs = {width: torch.randn(1, tokens, width) for width in (768, 3072)}
        times: dict[str, list[float]] = {"linear": [], "project": []}
        for round_number in range(args.rounds + 1):
            for name in times:
                start = time.perf_counter()
                for layer in layers:
                    x = inputs[layer.in_features]
                    project(layer, x) if name == "project" else layer(x)
                if round_number:  # the first one warms up
                    times[name].append(time.perf_counter() - start)
        linear, ours = (statistics.median(values) for values in times.values())
        speed = size / ours / 1e9
        print(f"{tokens:>6}{1e3 * linear:>14.1f}{1e3 * ours:>15.1f}{linear / ours:>14.2f}{speed:>7.1f}")


if __name__ == "__main__":
    main()

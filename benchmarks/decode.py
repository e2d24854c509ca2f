"""Time of attention of one query against long caches: the cpu kernels against SDPA with every head global.

    python benchmarks/decode.py --length 32768 --layers 12

The caches of all layers are used in turn, so that none of them is found in the processor's cache. Bandwidth
counts the keys and values that a query must see. Medians over
interleaved rounds, of CPU time with one thread and of wall time with more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from longshort import HeadLayout, attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--layers", type=int, default=12, help="caches that are used in turn")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--global-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    layout = HeadLayout.split(args.heads, args.global_heads, args.window)
    all_global = HeadLayout((None,) * args.heads)
    shape = (args.heads, args.length, args.head_dim)
    caches = [torch.randn(2, 1, *shape).unbind() for _ in range(args.layers)]
    query = torch.randn(1, args.heads, 1, args.head_dim)

    providers: dict[str, tuple[HeadLayout, Callable]] = {
        "sdpa, all heads global": (all_global, lambda k, v: F.scaled_dot_product_attention(query, k, v)),
        "cpu, all heads global": (all_global, lambda k, v: attention(query, k, v, all_global, backend="cpu")),
        "cpu": (layout, lambda k, v: attention(query, k, v, layout, backend="cpu")),
    }
    times: dict[str, list[float]] = {name: [] for name in providers}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    with torch.no_grad():
        for round_number in range(args.rounds + 1):
            for name, (_, attend) in providers.items():
                start = clock()
                for k, v in caches:
                    attend(k, v)
                if round_number:  # the first one warms up
                    times[name].append((clock() - start) / args.layers)
    baseline = times["sdpa, all heads global"]
    print(f"# torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads")
    print(f"{'provider':<24}{'microseconds':>14}{'times faster':>14}{'GB/s':>8}")
    for name, (computed, _) in providers.items():
        median = statistics.median(times[name])
        ratio = statistics.median(one / other for one, other in zip(baseline, times[name], strict=True))
        read = 8 * args.head_dim * computed.score_count(1, args.length) / median / 1e9
        print(f"{name:<24}{1e6 * median:>14.0f}{ratio:>14.1f}{read:>8.1f}")


if __name__ == "__main__":
    main()

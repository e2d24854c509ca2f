"""Cost of the attention monitor, as a share of a training step: plain and monitored steps, interleaved.

    python benchmarks/monitor.py --preset tiny --batch-size 8

A monitored step measures all heads of one forward and backward pass and takes the reading. Its extra time,
spread over the steps from one to the next, is the cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from longshort.data import Batch
from longshort.model import PRESETS, LongShortForCausalLM, preset
from longshort.stability import AttentionMonitor
from longshort.training.config import TrainConfig
from longshort.training.optimization import make_optimizer, optimizer_step
from longshort.training.parallel import Ranks


def measure(args: argparse.Namespace, mhsa: bool) -> tuple[float, float]:
    """Median CPU seconds of a plain and of a monitored step."""
    config = preset(args.preset, mhsa=mhsa, max_position_embeddings=args.length)
    assert isinstance(config.local_window, int)
    settings = TrainConfig(
        args.preset, Path("unused"), Path("unused"), batch_size=args.batch_size, precision=args.precision
    )
    torch.manual_seed(0)
    model = LongShortForCausalLM(config).train()
    optimizer = make_optimizer(model, settings)
    monitor = AttentionMonitor(model, config.local_window)
    tokens = torch.randint(config.vocab_size, (args.batch_size, args.length + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]))
    ranks = Ranks(torch.device("cpu"))

    def plain() -> None:
        optimizer_step(model, optimizer, batch, settings.learning_rate, settings, ranks)

    def monitored() -> None:
        with monitor.observing():
            plain()
        monitor.reading()

    seconds: dict[Callable[[], None], list[float]] = {plain: [], monitored: []}
    for repeat in range(args.repeats + 1):
        for step, times in seconds.items():
            start = time.process_time()
            step()
            if repeat:  # the first round warms up
                times.append(time.process_time() - start)
    return statistics.median(seconds[plain]), statistics.median(seconds[monitored])


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the attention monitor, as a share of a step.")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--every", type=int, default=10, help="steps from one measurement to the next")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"CPU capability {torch.backends.cpu.get_cpu_capability()}, {args.threads} thread(s)")
    print(f"{args.preset}, {args.batch_size} sequences of {args.length} tokens, {args.precision}")
    for name, mhsa in (("LS-attention", False), ("MHSA", True)):
        plain, monitored = measure(args, mhsa)
        share = (monitored - plain) / plain
        print(
            f"{name:<13} plain {1e3 * plain:8.1f} ms   monitored {1e3 * monitored:8.1f} ms (+{share:.0%})   "
            f"every {args.every} steps: +{share / args.every:.1%}"
        )


if __name__ == "__main__":
    main()

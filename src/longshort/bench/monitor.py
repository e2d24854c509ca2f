"""Cost of the attention monitor, as a share of a training step: plain against monitored steps.

A monitored step measures all heads of one forward and backward pass and reads the result. The cost is its
extra time, divided by the number of steps between two measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge

from longshort.bench.benchmark import Benchmark, Case, Note, Turn
from longshort.bench.machine import clock_name, count_threads, quiet_seconds
from longshort.bench.record import Column, in_same_round
from longshort.model import LongShortForCausalLM, preset
from longshort.stability import AttentionMonitor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class MonitorBenchmark(Benchmark):
    """Time training steps of LS-attention and of MHSA, with and without the attention monitor, in turns.

    Times are CPU time on one thread, wall time on more.
    """

    name = "monitor"
    title = "Time of a training step"
    known = ("plain", "monitored")
    baseline = "plain"
    table = (
        Column("ms", "milliseconds", ",.1f"),
        Column("90 %", "milliseconds", ",.1f", at="p90"),
        Column("more than plain", "extra", ".0%"),
        Column("spread over steps", "extra_per_step", ".1%"),
    )
    providers = known

    preset: str = "tiny"
    """Shape of the model: tiny, paper-small, paper-base, paper-large, or a JSON file."""

    lengths: tuple[Annotated[int, Ge(1)], ...] = (512,)
    """Tokens per sequence."""

    batch: Annotated[int, Ge(1)] = 8
    """Sequences of a step."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, with weights in fp32."""

    every: Annotated[int, Ge(1)] = 10
    """Steps from one measurement to the next."""

    threads: Annotated[int, Ge(1)] = 1
    """CPU threads."""

    rounds: Annotated[int, Ge(1)] = 15
    """Rounds that are measured, after one for warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        preset(self.preset)

    def cases(self) -> list[Case]:
        return [
            Case(
                length,
                f"{model} of preset {self.preset}, batch {self.batch}, {self.precision}, measured every "
                f"{self.every} steps, {count_threads(self.threads)}, {clock_name(self.threads)}",
                self.threads,
                {
                    "model": model, "preset": self.preset, "batch": self.batch, "precision": self.precision,
                    "every": self.every, "threads": self.threads,
                },
            )
            for length in dict.fromkeys(self.lengths)
            for model in ("LS-attention", "MHSA")
        ]  # fmt: skip

    def inputs(self, case: Case, group: Sequence[str]) -> tuple[Callable[[], None], AttentionMonitor]:
        """Make a plain step, and the monitor of its model."""
        config = preset(self.preset, mhsa=case.columns["model"] == "MHSA", max_position_embeddings=case.x)
        torch.manual_seed(0)
        model = LongShortForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.randint(config.vocab_size, (self.batch, case.x + 1))
        use_bf16 = self.precision == "bf16"

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
                out = model(tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        window = config.local_window
        return step, AttentionMonitor(model, window if isinstance(window, int) else None)

    def turn(self, case: Case, provider: str, inputs: Any, note: Note) -> Turn:
        plain, monitor = inputs

        def monitored() -> None:
            with monitor.observing():
                plain()
            monitor.reading()

        step = plain if provider == "plain" else monitored
        return lambda: {"milliseconds": 1e3 * quiet_seconds(step, case.threads)}

    def derive(self, case: Case, rounds: pd.DataFrame) -> pd.DataFrame:
        extra = rounds["milliseconds"] / in_same_round(rounds, "milliseconds", "plain") - 1
        return rounds.assign(extra=extra, extra_per_step=extra / self.every)

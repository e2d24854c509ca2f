"""The paper's trainings as settings of `longshort train`, with the GPUs that they are planned for.

From the author's public code are the shapes, the lengths, the batches of the small model and of n = 8192,
AdamW's settings (which are our defaults), 2,000 steps of warm-up, a cosine over 600,000 steps, and 50,000
steps. Assumed are half a million tokens a step at the other lengths, the number of GPUs, how work is cut,
and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longshort.checks import flag
from longshort.model import LongShortConfig, preset
from longshort.model.scaling import TrainingSetup

GPU_MEMORY = 80 * 2**30
"""Bytes of a GPU that the runs are planned for."""

GPUS_PER_NODE = 8
_TOKENS = 524_288  # a step


@dataclass(frozen=True)
class PaperRun:
    """One training.

    Attributes:
        name: readable name, also of the run's folder.
        preset: name of the model's shape.
        length: tokens of a sequence.
        ranks: GPUs.
        mhsa: whether all heads are global.
        context_parallel: GPUs that share a sequence.
        micro_batch: sequences of one forward pass of those GPUs.
        model: fields of `LongShortConfig` that differ from the preset's, as settings of `TrainConfig`.
        precision: the precision of the products.
    """

    name: str
    preset: str
    length: int
    ranks: int
    mhsa: bool = False
    context_parallel: int = 1
    micro_batch: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "bf16"

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return _TOKENS // self.length

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `TrainConfig` that are not its defaults, but for the preset, data and out."""
        chosen: dict[str, Any] = {
            "mhsa": self.mhsa,
            **self.model,
            "sequence_length": self.length,
            "batch_size": self.batch,
            "micro_batch_size": self.micro_batch,
            "steps": 50_000,
            "schedule_steps": 600_000,
            "warmup_steps": 2000,
            "learning_rate": 6e-4,
            "precision": self.precision,
            "parallel": "fsdp",
            "context_parallel": self.context_parallel,
            "checkpoint_every": 1000,
        }
        return {name: value for name, value in chosen.items() if value not in (None, False)}

    def config(self) -> LongShortConfig:
        """Make the config of its model."""
        names = {"window": "local_window", "global_heads": "num_global_heads"}
        fields = {names.get(name, name): value for name, value in self.model.items()}
        return preset(self.preset, mhsa=self.mhsa, **fields, max_position_embeddings=self.length)

    def setup(self) -> TrainingSetup:
        """Make its setup for plans."""
        return TrainingSetup(
            self.config(),
            self.length,
            self.batch,
            self.ranks,
            context_parallel=self.context_parallel,
            micro_batch=self.micro_batch,
            precision=self.precision,  # pyright: ignore[reportArgumentType]
        )

    def arguments(self, data: str = "data/pg19", out: str | None = None) -> list[str]:
        """Return the arguments of `longshort train`."""
        words = [self.preset, "--data", data, "--out", out or f"runs/{self.name}"]
        for name, value in self.settings.items():
            words += [flag(name)] if value is True else [flag(name), _text(value)]
        return words

    def command(self) -> str:
        """Return the whole command, one of the same on each node."""
        nodes = max(1, self.ranks // GPUS_PER_NODE)
        start = f"torchrun --nproc-per-node {min(self.ranks, GPUS_PER_NODE)} "
        if nodes > 1:
            start += f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint $HOST:29500 "
        return f"{start}-m longshort train {' '.join(self.arguments())}"


def paper_runs() -> list[PaperRun]:
    """Return the paper's runs: of each model and length LS-attention and MHSA; of the large model also four
    global heads; and at n = 8192 MHSA in fp32 and with QK-norm (figure 5)."""
    runs = []
    for name, mhsa in (("ls", False), ("mhsa", True)):
        runs.append(PaperRun(f"small-2048-{name}", "paper-small", 2048, 8, mhsa, model={"window": 50}))
    for length in (512, 1024, 2048, 4096, 8192):
        shared = 2 if length == 8192 else 1
        for name, mhsa in (("ls", False), ("mhsa", True)):
            runs.append(PaperRun(f"base-{length}-{name}", "paper-base", length, 8, mhsa, shared))
    runs += [
        PaperRun("base-8192-mhsa-fp32", "paper-base", 8192, 8, True, 2, 8, precision="fp32"),
        PaperRun("base-8192-mhsa-qk-norm", "paper-base", 8192, 8, True, 2, model={"qk_norm": True}),
        PaperRun("large-8192-ls", "paper-large", 8192, 16, False, 2, 4),
        PaperRun("large-8192-ls-4", "paper-large", 8192, 16, False, 2, 4, model={"global_heads": 4}),
        PaperRun("large-8192-mhsa", "paper-large", 8192, 16, True, 2, 4),
    ]
    return runs


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

"""The arms and sizes that several studies share, so that they share the trials too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from longshort.studies.language import Arm, Setting

LS = Arm("LS")
"""The preset's layout: one global head, the others local."""

MHSA = Arm("MHSA", train={"mhsa": True})
"""Every head global."""


def tiny(length: int, batch: int, steps: int, **model: Any) -> Setting:
    """The preset `tiny` on bytes: 2 layers, width 64, 4 heads of 16, window 16; attention in bf16, as in the
    paper."""
    return Setting(
        {"preset": "tiny", "attention_precision": "bf16", **model},
        {
            "sequence_length": length,
            "batch_size": batch,
            "steps": steps,
            "warmup_steps": min(100, steps // 4),
            "validation_windows": max(1, min(32, steps // 3) * 512 // length),
        },
        f"Models of 2 layers, width 64 and 4 heads of 16, on bytes: {steps:,} steps of {batch} sequences of "
        f"{length} bytes, a constant learning rate after the warm-up, attention in bf16; LS has one global "
        "head and three with a window of 16. All arms of a seed start from the same weights and see the same "
        "batches.",
    )


PAPER_RATES: Sequence[float] = (3e-4, 1e-3, 3e-3)
"""Around the author's 6e-4."""

PAPER_SMALL = Setting(
    {"preset": "paper-small", "attention_precision": "bf16", "local_window": 50},
    {
        "sequence_length": 2048,
        "batch_size": 256,
        "micro_batch_size": 16,
        "steps": 50_000,
        "warmup_steps": 2000,
        "precision": "bf16",
        "validation_windows": 64,
    },
    "The author's small model: 6 layers, 6 heads of 32, width 192, n = 2048, window 50, 256 sequences.",
    PAPER_RATES,
)
"""The author's small model."""


def paper_base(length: int) -> Setting:
    """The author's base model at a sequence length, half a million tokens a step."""
    batch = max(1, 524_288 // length)
    return Setting(
        {"preset": "paper-base", "attention_precision": "bf16"},
        {
            "sequence_length": length,
            "batch_size": batch,
            "micro_batch_size": max(1, 16_384 // length),
            "steps": 50_000,
            "warmup_steps": 2000,
            "precision": "bf16",
            "validation_windows": 32,
        },
        f"The author's base model: 12 layers, 12 heads of 64, width 768, n = {length}, window 100.",
        PAPER_RATES,
    )


def with_model(arm: Arm, name: str, **model: Any) -> Arm:
    """The arm with further fields of its model's config."""
    return replace(arm, name=name, model={**arm.model, **model})


def with_train(arm: Arm, name: str, **train: Any) -> Arm:
    """The arm with further settings of its training."""
    return replace(arm, name=name, train={**arm.train, **train})


MHSA_ROPE = with_model(MHSA, "MHSA + RoPE", position_embedding="rope")
LS_ROPE = with_model(LS, "LS + RoPE", position_embedding="rope")
DEEP_LS = with_model(LS, "LS, 4 layers", num_hidden_layers=4)
HYBRID = with_model(LS, "hybrid by layers, 4 layers", num_hidden_layers=4, num_global_heads=[0, 0, 0, 4])
"""As many global heads as `DEEP_LS`, all in the last layer, as in Gemma 3."""

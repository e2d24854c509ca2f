"""The language models that studies compare, and the settings in which they are trained.

Arms of one seed start from the same weights and see the same batches, at equal steps and schedules. Variants
and settings that several studies use are defined here, so that the studies share the trials too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from longshort.model import LongShortConfig, preset, training_flops
from longshort.studies.framework.study import Trial
from longshort.studies.framework.sweep import Arm, Ladder

_FLOPS_PER_SECOND = 4e10  # on one core of a laptop, with overhead; to estimate the time left


@dataclass(frozen=True)
class Variant:
    """The settings in which one arm differs from others.

    Attributes:
        name: name in tables and legends.
        model: fields of `LongShortConfig`.
        train: fields of `TrainConfig`.
        measure: measurements after the training; see `train_language_model`.
        hidden_keys: share of the keys that `hide_keys` hides.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    measure: Mapping[str, Any] = field(default_factory=dict)
    hidden_keys: float = 0.0

    def with_model(self, name: str, **model: Any) -> Variant:
        """Make a variant with further fields of its model's config."""
        return replace(self, name=name, model={**self.model, **model})

    def with_train(self, name: str, **train: Any) -> Variant:
        """Make a variant with further settings of its training."""
        return replace(self, name=name, train={**self.train, **train})


@dataclass(frozen=True)
class Setting:
    """The settings that all arms of a comparison share.

    Attributes:
        model: fields of `LongShortConfig` that override the preset named by the key "preset".
        train: fields of `TrainConfig`.
        description: description for the report.
        rates: learning rates that every sweep tries, ascending, from … 1e-3, 3e-3, 1e-2 …
    """

    model: Mapping[str, Any]
    train: Mapping[str, Any]
    description: str
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)

    def trial(self, variant: Variant, rate: float, seed: int) -> Trial:
        """Make the trial of a variant at a learning rate."""
        model = {**self.model, **variant.model}
        training = {"schedule": "constant", **self.train, **variant.train}
        training |= {"learning_rate": rate, "seed": seed}
        length, mhsa = training["sequence_length"], training.get("mhsa", False)
        flops = _flops_of_sequence(json.dumps(model, sort_keys=True), length, mhsa)
        settings: dict[str, Any] = {"model": model, "train": training}
        if variant.measure:
            settings["measure"] = dict(variant.measure)
        if variant.hidden_keys:
            settings["hidden_keys"] = variant.hidden_keys
        sequences = training["steps"] * training["batch_size"]
        return Trial(variant.name, seed, settings, flops * sequences / _FLOPS_PER_SECOND)

    def arm(self, variant: Variant) -> Arm:
        """Make the arm of a variant, with its own sweep."""
        return Arm(variant.name, partial(self.trial, variant), Ladder(self.rates))

    def extent(self, seeds: int) -> str:
        """Say how far the runs of so many seeds go: "n = 1,024, 82M tokens, 3 seeds"."""
        length = self.train["sequence_length"]
        tokens = self.train["steps"] * self.train["batch_size"] * length
        return f"n = {length:,}, {1e-6 * tokens:.2g}M tokens, {seeds} seed{'s' if seeds > 1 else ''}"

    def arms(self, variants: Sequence[Variant]) -> list[Arm]:
        """Make the arms of variants."""
        return [self.arm(variant) for variant in variants]


def model_config(model: Mapping[str, Any], training: Mapping[str, Any]) -> LongShortConfig:
    """Make the config of a trial's model."""
    fields = {key: value for key, value in model.items() if key != "preset"}
    length = training["sequence_length"]
    return preset(model["preset"], mhsa=training.get("mhsa", False), **fields, max_position_embeddings=length)


@cache
def _flops_of_sequence(model: str, length: int, mhsa: bool) -> int:
    """Count the operations of training on one sequence.

    The model's fields come as JSON, so that the count can be kept: a study makes thousands of trials of a few
    models.
    """
    config = model_config(json.loads(model), {"sequence_length": length, "mhsa": mhsa})
    return training_flops(config, length).total


LS = Variant("LS")
"""The variant with the preset's layout: one global head, the others local."""

MHSA = Variant("MHSA", train={"mhsa": True})
"""The variant with every head global."""

MHSA_ROPE = MHSA.with_model("MHSA + RoPE", position_embedding="rope")
LS_ROPE = LS.with_model("LS + RoPE", position_embedding="rope")
LS_LOCAL_ROPE = LS_ROPE.with_model("LS + RoPE, none on global heads", global_position_embedding="none")
QK_NORM = MHSA.with_model("MHSA + QK-norm", qk_norm=True)
DEEP_LS = LS.with_model("LS, 4 layers", num_hidden_layers=4)
HYBRID = LS.with_model("hybrid by layers, 4 layers", num_hidden_layers=4, num_global_heads=[0, 0, 0, 4])
"""A variant with as many global heads as `DEEP_LS`, all in the last layer, as in Gemma 3."""


def tiny(length: int, batch: int, steps: int, rates: Sequence[float] = Setting.rates) -> Setting:
    """Make the setting of the preset `tiny` on bytes: 2 layers, width 64, 4 heads of 16, window 16; attention
    in bf16, as in the paper."""
    return Setting(
        {"preset": "tiny", "attention_precision": "bf16"},
        {
            "sequence_length": length,
            "batch_size": batch,
            "steps": steps,
            "warmup_steps": min(100, steps // 4),
            "validation_windows": max(1, min(32, steps // 12) * 512 // length),
        },
        f"Models of 2 layers, width 64 and 4 heads of 16, on bytes: {steps:,} steps of {batch} sequences of "
        f"{length} bytes, a constant learning rate after the warm-up, attention in bf16; LS has one global "
        "head and three with a window of 16. All arms of a seed start from the same weights and see the same "
        "batches.",
        rates,
    )


def steady(length: int, tokens: int, steps: int, rates: Sequence[float] = (3e-3,), **train: Any) -> Setting:
    """Make a setting of the preset `tiny` for comparisons at equal progress: a constant learning rate, then a
    line to 0 over the last tenth; a probe of 32 validation windows every 50 steps.

    Args:
        length: tokens of a sequence.
        tokens: tokens of a step.
        steps: steps of a run.
        rates: learning rates; a single one is not swept.
        **train: further fields of `TrainConfig`.
    """
    every = max(1, min(50, steps // 4))
    return Setting(
        {"preset": "tiny", "attention_precision": "bf16"},
        {
            "sequence_length": length,
            "batch_size": tokens // length,
            "steps": steps,
            "warmup_steps": min(200, steps // 4),
            "schedule": "wsd",
            "decay_steps": max(1, steps // 10),
            "validation_windows": max(1, min(32, steps // 5)),
            "evaluate_every": every,
            "monitor_every": every,
            "checkpoint_every": min(steps, 1000),
            "keep_checkpoints": 1,
            "probe": True,
            **train,
        },
        f"Models of 2 layers, width 64 and 4 heads of 16, on bytes: {steps:,} steps of {tokens:,} bytes in "
        f"sequences of {length}, a constant learning rate after the warm-up that falls to 0 over the last "
        "tenth, weight decay 0.1, attention in bf16; LS has one global head and three with a window of 16. "
        "All arms of a seed start from the same weights and see the same batches.",
        rates,
    )


PAPER_RATES: Sequence[float] = (3e-4, 1e-3, 3e-3)
"""The learning rates around the author's 6e-4."""

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


ONE_GPU = replace(
    steady(2048, 65_536, 2000, rates=(6e-4, 3e-3), precision="bf16", checkpoint_every=500),
    model={**PAPER_SMALL.model, "vocab_size": 257},
    description=(
        "The author's small model on bytes: 6 layers, 6 heads of 32, width 192; 2,000 steps of 32 sequences "
        "of 2,048 bytes, a constant learning rate after the warm-up that falls to 0 over the last tenth, "
        "weight decay 0.1, autocast to bf16; LS has one global head and five with a window of 50. Both arms "
        "start from the same weights and see the same batches."
    ),
)
"""The author's small model for minutes on one GPU, at the author's rate and at that of `tiny`. Its tokens are
bytes, so that losses mean the same as at the other scales."""


def paper_base(length: int) -> Setting:
    """Make the setting of the author's base model at a sequence length, half a million tokens a step."""
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

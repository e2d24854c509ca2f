"""Every setting of a training run: the flags of `longshort train`, as one flat dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from longshort.data import TokenOrder
from longshort.layout import require_integer

PositionEmbedding = Literal["learned", "rope", "alibi", "none"]
AttentionPrecision = Literal["input", "fp32", "bf16", "bf16-flash"]
Schedule = Literal["cosine", "constant"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
OnSpike = Literal["report", "stop", "rollback"]


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what and how. Model settings that are left out are the preset's.

    Raises:
        ValueError: a value is out of its range, or two contradict each other; the message names the flag.
    """

    preset: str
    """Model to start from: tiny, paper-small, paper-base, paper-large, or a JSON file (*.json) with fields of
    LongShortConfig."""

    data: Path
    """Folder that `longshort data` wrote."""

    out: Path
    """Folder for this run; it must not exist, or be empty."""

    mhsa: bool = False
    """Make all heads global: the baseline of equal size, initial weights and batches."""

    window: int | None = None
    """Keys that a local head's query sees, itself included; for --mhsa the band that is monitored."""

    global_heads: int | None = None
    """Global heads per layer."""

    layers: int | None = None
    """Number of layers."""

    hidden_size: int | None = None
    """Width of the model."""

    heads: int | None = None
    """Attention heads per layer."""

    head_dim: int | None = None
    """Width of one head."""

    kv_heads: int | None = None
    """Key/value heads per layer."""

    sequence_length: int | None = None
    """Tokens per training sequence, and the longest that learned positions allow."""

    position_embedding: PositionEmbedding | None = None
    """How positions enter the model."""

    global_position_embedding: PositionEmbedding | None = None
    """How positions enter the global heads, where that differs."""

    qk_norm: bool | None = None
    """Normalize queries and keys per head."""

    softcap: float | None = None
    """Bound of the attention scores: softcap * tanh(score / softcap)."""

    sink_logits: bool | None = None
    """Learn a logit per head that joins the softmax's denominator, as in gpt-oss."""

    short_convolution: int | None = None
    """Kernel size of a causal depthwise convolution on queries, keys and values, as in Primer; at least 2."""

    sink_tokens: int | None = None
    """First tokens of each document that local heads always see."""

    attention_precision: AttentionPrecision | None = None
    """Rounding inside attention."""

    steps: int = 1000
    """Optimizer steps."""

    batch_size: int = 16
    """Sequences per optimizer step, over all processes and micro-batches."""

    micro_batch_size: int | None = None
    """Sequences per forward pass of one process; smaller ones take less memory. None: all at once."""

    learning_rate: float = 6e-4
    """Learning rate after the warm-up."""

    min_learning_rate: float | None = None
    """Where the cosine ends. None: a tenth of the learning rate."""

    schedule: Schedule = "cosine"
    """Learning rate after the warm-up."""

    warmup_steps: int | None = None
    """Steps of linear warm-up. None: a tenth of the steps, at most 2000."""

    schedule_steps: int | None = None
    """Step at which the cosine ends; it stays at its end afterwards. None: the steps of this run."""

    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""

    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""

    weight_decay: float = 0.1
    """AdamW: decay of matrices, embeddings among them. Gains do not decay."""

    grad_clip: float = 1.0
    """Largest norm of the gradient. 0: no clipping."""

    z_loss: float = 0.0
    """Weight of the z-loss (PaLM: 1e-4) in what is differentiated; the reported loss has none of it."""

    qk_clip: float | None = None
    """After each step, scale queries and keys of heads whose largest logit was above this (Kimi K2: 100).
    Every step is measured then, which takes some time."""

    seed: int = 0
    """Seed of the initial weights and of the batches."""

    precision: Precision = "fp32"
    """bf16: autocast, weights and optimizer stay in fp32."""

    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""

    compile: bool = False
    """Compile the model with torch.compile."""

    separate_documents: bool = False
    """Cut attention where a new document begins, which is at the end-of-text token before it."""

    token_order: TokenOrder = "text"
    """Control experiments: permuted puts the tokens of every sequence into one random order, interleaved
    weaves each sequence of pieces of text from independent places."""

    interleave: int = 16
    """Pieces per interleaved sequence: tokens of one piece are so many tokens apart."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    monitor_every: int = 10
    """Steps between measurements of the attention logits. 0: none."""

    monitor_row_range: bool = False
    """Measure the row range too, the largest difference between two logits of one query; slow where heads are
    global."""

    evaluate_every: int = 200
    """Steps between validation losses. 0: none."""

    validation_windows: int = 64
    """Sequences of the validation split that such a loss is measured on, at most; they are shorter where the
    split is, but not in another token order than text."""

    checkpoint_every: int = 200
    """Steps between checkpoints; there is one at the end too."""

    keep_checkpoints: int | None = None
    """How many checkpoints to keep, the latest ones; with --on-spike rollback also those that it may need.
    None: all."""

    on_spike: OnSpike | None = None
    """What to do when loss, gradient norm or largest logit spikes. report: say so. stop: write a checkpoint
    and end. rollback: go back to a checkpoint and leave out batches. Each of them makes every step wait for
    the GPU. None: do not look."""

    rollback_steps: int = 100
    """Rollback: to the latest checkpoint at least so many steps before the spike began, else to the first."""

    skip_batches: int = 200
    """Rollback: so many batches are left out from there on, and at least those up to the spike."""

    max_rollbacks: int = 5
    """Rollback: the next spike after so many ends the run as with stop."""

    threads: int | None = None
    """CPU threads of each process. None: torch's default."""

    device: Device = "auto"
    """auto: a GPU where there is one."""

    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into OUT/tensorboard."""

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))  # the dataclass is frozen
        for name, least in _INTEGERS.items():
            if self._is_set(name):
                require_integer(flag(name), getattr(self, name), minimum=least)
        require_seed("--seed", self.seed)
        for name, choices in _CHOICES.items():
            if self._is_set(name) and getattr(self, name) not in choices:
                raise ValueError(
                    f"{flag(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name, (allowed, lies_inside) in _REALS.items():
            if self._is_set(name):
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int | float) or not lies_inside(value):
                    raise ValueError(f"{flag(name)} must be a number {allowed}, got {value!r}")
        for name in _SWITCHES:
            if self._is_set(name) and not isinstance(getattr(self, name), bool):
                raise ValueError(f"{flag(name)} must be True or False, got {getattr(self, name)!r}")
        if self.mhsa and self.global_heads is not None:
            raise ValueError(
                f"--global-heads does not go with --mhsa, where all heads are global, got {self.global_heads}"
            )
        if self.separate_documents and self.token_order != "text":
            raise ValueError(
                "--separate-documents does not go with --token-order "
                f"{self.token_order}, which mixes the documents of a sequence"
            )
        if (
            self.token_order == "interleaved"
            and self.sequence_length is not None
            and self.interleave > self.sequence_length
        ):
            raise ValueError(
                f"--interleave must be at most --sequence-length ({self.sequence_length}), "
                f"got {self.interleave}"
            )
        if self.monitor_row_range and not self.monitor_every:
            raise ValueError(f"--monitor-row-range needs --monitor-every >= 1, got {self.monitor_every}")
        if self.qk_clip is not None and self.qk_norm:
            raise ValueError(
                f"--qk-clip does not go with --qk-norm, which undoes any scaling, got {self.qk_clip}"
            )
        warmup_steps, schedule_steps, min_learning_rate = self.schedule_or_defaults()
        if min_learning_rate > self.learning_rate:
            raise ValueError(
                f"--min-learning-rate must be at most --learning-rate ({self.learning_rate}), "
                f"got {min_learning_rate}"
            )
        if self.schedule == "cosine" and warmup_steps >= schedule_steps:
            raise ValueError(
                f"--warmup-steps must be below the end of the cosine ({schedule_steps}: "
                f"--schedule-steps, else --steps), got {warmup_steps}"
            )

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) is not None or name not in _MAY_BE_NONE

    def schedule_or_defaults(self) -> tuple[int, int, float]:
        """`warmup_steps`, `schedule_steps` and `min_learning_rate`, defaults filled in."""
        return (
            min(2000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps,
            self.steps if self.schedule_steps is None else self.schedule_steps,
            self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate,
        )

    def model_overrides(self) -> dict[str, Any]:
        """The model settings that were given, under the names of `LongShortConfig`."""
        given = {theirs: getattr(self, ours) for ours, theirs in MODEL_SETTINGS.items()}
        return {name: value for name, value in given.items() if value is not None}


MODEL_SETTINGS = {
    "window": "local_window",
    "global_heads": "num_global_heads",
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "head_dim": "head_dim",
    "kv_heads": "num_key_value_heads",
    "sequence_length": "max_position_embeddings",
    "position_embedding": "position_embedding",
    "global_position_embedding": "global_position_embedding",
    "qk_norm": "qk_norm",
    "softcap": "softcap",
    "sink_logits": "sink_logits",
    "short_convolution": "short_convolution",
    "sink_tokens": "sink_tokens",
    "attention_precision": "attention_precision",
}
"""Which field of `LongShortConfig` each model setting overrides."""


def require_seed(name: str, seed: Any) -> None:
    """Raise a ValueError that names the argument unless seed is an integer that generators take."""
    require_integer(name, seed, minimum=0)
    if seed >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {seed}")


def flag(field: str) -> str:
    """The command-line flag of a setting: batch_size -> --batch-size."""
    return "--" + field.replace("_", "-")


_INTEGERS = {
    "window": 1,
    "global_heads": 0,
    "layers": 1,
    "hidden_size": 1,
    "heads": 1,
    "head_dim": 1,
    "kv_heads": 1,
    "sequence_length": 1,
    "short_convolution": 2,
    "sink_tokens": 0,
    "steps": 1,
    "batch_size": 1,
    "micro_batch_size": 1,
    "warmup_steps": 0,
    "schedule_steps": 1,
    "interleave": 1,
    "log_every": 1,
    "monitor_every": 0,
    "evaluate_every": 0,
    "validation_windows": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "rollback_steps": 1,
    "skip_batches": 0,
    "max_rollbacks": 0,
    "threads": 1,
}
"""Smallest value of each."""

_POSITIVE = ("> 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = (">= 0", lambda value: 0 <= value < math.inf)
_DECAY = (">= 0 and < 1", lambda value: 0 <= value < 1)
_REALS = {
    "learning_rate": _POSITIVE,
    "min_learning_rate": _NOT_NEGATIVE,
    "softcap": _POSITIVE,
    "beta1": _DECAY,
    "beta2": _DECAY,
    "weight_decay": _NOT_NEGATIVE,
    "grad_clip": _NOT_NEGATIVE,
    "z_loss": _NOT_NEGATIVE,
    "qk_clip": _POSITIVE,
}
_CHOICES = {
    "position_embedding": get_args(PositionEmbedding),
    "global_position_embedding": get_args(PositionEmbedding),
    "attention_precision": get_args(AttentionPrecision),
    "schedule": get_args(Schedule),
    "token_order": get_args(TokenOrder),
    "precision": get_args(Precision),
    "device": get_args(Device),
    "on_spike": get_args(OnSpike),
}
_SWITCHES = (
    "mhsa",
    "qk_norm",
    "sink_logits",
    "gradient_checkpointing",
    "compile",
    "separate_documents",
    "tensorboard",
    "monitor_row_range",
)
_MAY_BE_NONE = {field.name for field in fields(TrainConfig) if field.default is None}

"""Every setting of a training run: the flags of `longshort train`, as one flat dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from longshort.checks import check_fields
from longshort.data import TokenOrder

PositionEmbedding = Literal["learned", "rope", "alibi", "none"]
AttentionPrecision = Literal["input", "fp32", "bf16", "bf16-flash"]
Schedule = Literal["cosine", "constant"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
OnSpike = Literal["report", "stop", "rollback"]
Seed = Annotated[int, Ge(0), Lt(2**63)]
"""What every random generator takes."""


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

    window: Annotated[int, Ge(1)] | None = None
    """Keys that a local head's query sees, itself included; for --mhsa the band that is monitored."""

    global_heads: Annotated[int, Ge(0)] | None = None
    """Global heads per layer."""

    layers: Annotated[int, Ge(1)] | None = None
    """Number of layers."""

    hidden_size: Annotated[int, Ge(1)] | None = None
    """Width of the model."""

    heads: Annotated[int, Ge(1)] | None = None
    """Attention heads per layer."""

    head_dim: Annotated[int, Ge(1)] | None = None
    """Width of one head."""

    kv_heads: Annotated[int, Ge(1)] | None = None
    """Key/value heads per layer."""

    sequence_length: Annotated[int, Ge(1)] | None = None
    """Tokens per training sequence, and the longest that learned positions allow."""

    position_embedding: PositionEmbedding | None = None
    """How positions enter the model."""

    global_position_embedding: PositionEmbedding | None = None
    """How positions enter the global heads, where that differs."""

    qk_norm: bool | None = None
    """Normalize queries and keys per head."""

    softcap: Annotated[float, Gt(0)] | None = None
    """Bound of the attention scores: softcap * tanh(score / softcap)."""

    sink_logits: bool | None = None
    """Learn a logit per head that joins the softmax's denominator, as in gpt-oss."""

    short_convolution: Annotated[int, Ge(2)] | None = None
    """Kernel size of a causal depthwise convolution on queries, keys and values, as in Primer; at least 2."""

    sink_tokens: Annotated[int, Ge(0)] | None = None
    """First tokens of each document that local heads always see."""

    attention_precision: AttentionPrecision | None = None
    """Rounding inside attention."""

    steps: Annotated[int, Ge(1)] = 1000
    """Optimizer steps."""

    batch_size: Annotated[int, Ge(1)] = 16
    """Sequences per optimizer step, over all processes and micro-batches."""

    micro_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per forward pass of one process; smaller ones take less memory. None: all at once."""

    learning_rate: Annotated[float, Gt(0)] = 6e-4
    """Learning rate after the warm-up."""

    min_learning_rate: Annotated[float, Ge(0)] | None = None
    """Where the cosine ends. None: a tenth of the learning rate."""

    schedule: Schedule = "cosine"
    """Learning rate after the warm-up."""

    warmup_steps: Annotated[int, Ge(0)] | None = None
    """Steps of linear warm-up. None: a tenth of the steps, at most 2000."""

    schedule_steps: Annotated[int, Ge(1)] | None = None
    """Step at which the cosine ends; it stays at its end afterwards. None: the steps of this run."""

    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """AdamW: decay of the mean of gradients."""

    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """AdamW: decay of the mean of squared gradients."""

    weight_decay: Annotated[float, Ge(0)] = 0.1
    """AdamW: decay of matrices, embeddings among them. Gains do not decay."""

    grad_clip: Annotated[float, Ge(0)] = 1.0
    """Largest norm of the gradient. 0: no clipping."""

    z_loss: Annotated[float, Ge(0)] = 0.0
    """Weight of the z-loss (PaLM: 1e-4) in what is differentiated; the reported loss has none of it."""

    qk_clip: Annotated[float, Gt(0)] | None = None
    """After each step, scale queries and keys of heads whose largest logit was above this (Kimi K2: 100).
    Every step is measured then, which takes some time."""

    seed: Seed = 0
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

    interleave: Annotated[int, Ge(1)] = 16
    """Pieces per interleaved sequence: tokens of one piece are so many tokens apart."""

    log_every: Annotated[int, Ge(1)] = 10
    """Steps between lines of metrics.jsonl."""

    monitor_every: Annotated[int, Ge(0)] = 10
    """Steps between measurements of the attention logits. 0: none."""

    monitor_row_range: bool = False
    """Measure the row range too, the largest difference between two logits of one query; slow where heads are
    global."""

    evaluate_every: Annotated[int, Ge(0)] = 200
    """Steps between validation losses. 0: none."""

    validation_windows: Annotated[int, Ge(1)] = 64
    """Sequences of the validation split that such a loss is measured on, at most; they are shorter where the
    split is, but not in another token order than text."""

    checkpoint_every: Annotated[int, Ge(1)] = 200
    """Steps between checkpoints; there is one at the end too."""

    keep_checkpoints: Annotated[int, Ge(1)] | None = None
    """How many checkpoints to keep, the latest ones; with --on-spike rollback also those that it may need.
    None: all."""

    on_spike: OnSpike | None = None
    """What to do when loss, gradient norm or largest logit spikes. report: say so. stop: write a checkpoint
    and end. rollback: go back to a checkpoint and leave out batches. Each of them makes every step wait for
    the GPU. None: do not look."""

    rollback_steps: Annotated[int, Ge(1)] = 100
    """Rollback: to the latest checkpoint at least so many steps before the spike began, else to the first."""

    skip_batches: Annotated[int, Ge(0)] = 200
    """Rollback: so many batches are left out from there on, and at least those up to the spike."""

    max_rollbacks: Annotated[int, Ge(0)] = 5
    """Rollback: the next spike after so many ends the run as with stop."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads of each process. None: torch's default."""

    device: Device = "auto"
    """auto: a GPU where there is one."""

    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into OUT/tensorboard."""

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))  # the dataclass is frozen
        check_fields(self)
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

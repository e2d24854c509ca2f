"""Every setting of a training run: the flags of `longshort train`, as one flat dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from longshort.checks import check_fields, flag
from longshort.data import TokenOrder
from longshort.stability import Alarm

PositionEmbedding = Literal["learned", "rope", "alibi", "none"]
AttentionPrecision = Literal["input", "fp64", "fp32", "bf16", "bf16-flash", "sdpa-bf16"]
Schedule = Literal["cosine", "constant", "wsd"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Parallel = Literal["ddp", "fsdp"]
OnSpike = Literal["report", "stop", "rollback"]
Seed = Annotated[int, Ge(0), Lt(2**63)]
"""A seed that every random generator takes."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. Model settings that are left out are those of the preset.

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
    """Keys that a query of a local head sees, itself included; with --mhsa the band that is monitored."""

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
    """Kind of positions."""

    global_position_embedding: PositionEmbedding | None = None
    """Kind of positions of the global heads, if it differs."""

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
    """Rounding inside attention. fp64: almost none, and slow. bf16: queries, keys and values. bf16-flash: the
    probabilities too. sdpa-bf16: as bf16, but global heads go through PyTorch's own flash kernel, which has
    no softcap, ALiBi, sink logits or separate documents."""

    steps: Annotated[int, Ge(1)] = 1000
    """Optimizer steps."""

    batch_size: Annotated[int, Ge(1)] = 16
    """Sequences per optimizer step, over all processes and micro-batches."""

    micro_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per forward pass of one process; smaller ones take less memory. None: all at once."""

    learning_rate: Annotated[float, Gt(0)] = 6e-4
    """Learning rate after the warm-up."""

    min_learning_rate: Annotated[float, Ge(0)] | None = None
    """Learning rate at the end of the schedule. None: a tenth of the learning rate; with wsd 0."""

    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up; wsd is constant, then falls linearly."""

    warmup_steps: Annotated[int, Ge(0)] | None = None
    """Steps of linear warm-up. None: a tenth of the steps, at most 2000."""

    schedule_steps: Annotated[int, Ge(1)] | None = None
    """Step at which the schedule ends; then the learning rate is constant. None: the steps of this run."""

    decay_steps: Annotated[int, Ge(1)] | None = None
    """Length of the fall with wsd. None: a tenth of the schedule."""

    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """AdamW: decay of the mean of gradients."""

    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """AdamW: decay of the mean of squared gradients."""

    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    """AdamW: number added to the root of the mean of squared gradients."""

    weight_decay: Annotated[float, Ge(0)] = 0.1
    """AdamW: decay of matrices, including embeddings. Gains do not decay."""

    grad_clip: Annotated[float, Ge(0)] = 1.0
    """Largest norm of the gradient. 0: no clipping."""

    qk_learning_rate_factor: Annotated[float, Gt(0), Le(1)] = 1.0
    """Learning rate of the query and key projections as a share of that of all other weights, at every step:
    0.1 is a tenth, 1 the same."""

    z_loss: Annotated[float, Ge(0)] = 0.0
    """Weight of the z-loss (PaLM: 1e-4) in what is differentiated; the reported loss is without it."""

    qk_clip: Annotated[float, Gt(0)] | None = None
    """After each step, scale queries and keys of heads whose largest logit was above this (Kimi K2: 100).
    This measures the logits on every step, which takes some time."""

    seed: Seed = 0
    """Seed of the initial weights and of the batches."""

    precision: Precision = "fp32"
    """bf16: autocast, weights and optimizer stay in fp32."""

    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""

    compile: bool = False
    """Compile the forward pass with its losses, and the backward pass, with torch.compile. Steps that measure
    the attention logits, and micro-batches of another size, take graphs of their own, compiled once."""

    separate_documents: bool = False
    """Let no token see an earlier document; a document begins at the end-of-text token before it."""

    token_order: TokenOrder = "text"
    """Control experiments: permuted puts the tokens of every sequence into the same random order; interleaved
    alternates between tokens of several pieces of text from independent places."""

    interleave: Annotated[int, Ge(1)] = 16
    """Pieces per interleaved sequence, which is also the distance between successive tokens of one piece."""

    log_every: Annotated[int, Ge(1)] = 10
    """Steps between lines of metrics.jsonl. Only a step with a line waits for a GPU."""

    monitor_every: Annotated[int, Ge(0)] = 10
    """Steps between measurements of the attention logits. 0: none."""

    monitor_row_range: bool = False
    """Measure the row range too, the largest difference between two logits of one query; slow for global
    heads."""

    alarms: bool = False
    """Measure with the attention logits what all alarms need, by head: row ranges, and the spectral entropy
    of the update of query and key weights."""

    evaluate_every: Annotated[int, Ge(0)] = 200
    """Steps between validation losses. 0: none."""

    stop_at_loss: Annotated[float, Gt(0)] | None = None
    """End the run, with a checkpoint, once a validation loss is this low."""

    probe: bool = False
    """With each validation loss, also measure the attention logits of those sequences by head, and the loss
    on the second half of random tokens that repeat, which shows whether the model copies."""

    validation_windows: Annotated[int, Ge(1)] = 64
    """Most sequences of the validation split on which the validation loss is measured. If the split is
    shorter than a sequence, so are they, but only in the token order text."""

    checkpoint_every: Annotated[int, Ge(1)] = 200
    """Steps between checkpoints; there is one at the end too."""

    keep_checkpoints: Annotated[int, Ge(1)] | None = None
    """Number of latest checkpoints to keep; with --on-spike rollback those that it may need are kept too.
    None: all."""

    async_checkpoints: bool = False
    """With --parallel fsdp, train on while a checkpoint is written, from a copy in CPU memory."""

    on_spike: OnSpike | None = None
    """Action when loss, gradient norm or largest logit spikes. report: print a message. stop: write a
    checkpoint and end. rollback: go back to a checkpoint and leave out batches. Any of them makes every step
    wait for the GPU. None: spikes are not detected."""

    alarm: Alarm | None = None
    """With --on-spike, a sign of a spike that may come before its loss: row-range (a head's row range grows
    fast), entropy (a head's entropy has collapsed) or update (the spectral entropy of its update has). It is
    measured with the attention logits. No study has shown yet that one of them warns in time."""

    rollback_steps: Annotated[int, Ge(1)] = 100
    """Rollback: go back to the latest checkpoint at least this many steps before the spike began, else to the
    first."""

    skip_batches: Annotated[int, Ge(0)] = 200
    """Rollback: number of batches to leave out from that checkpoint on; at least those up to the spike."""

    max_rollbacks: Annotated[int, Ge(0)] = 5
    """Rollback: after this many rollbacks, the next spike ends the run as with stop."""

    parallel: Parallel = "ddp"
    """Training on the processes that torchrun started. ddp: each has a copy of the model. fsdp: weights,
    gradients and optimizer are cut into shards (FSDP2), and so are checkpoints."""

    shards: Annotated[int, Ge(1)] | None = None
    """With --parallel fsdp, processes among which the model is cut; groups of so many hold copies of it
    (HSDP). None: all."""

    context_parallel: Annotated[int, Ge(1)] = 1
    """Processes that share each sequence, every one with a contiguous part of it."""

    gather_memory: Annotated[int, Ge(0)] | None = None
    """With --context-parallel, bytes that the gathered keys and values of one layer's global heads may take
    on each process; beyond that they go round in a ring. None: any."""

    timeout: Annotated[float, Gt(0)] = 600.0
    """Seconds for which a process waits for the others before all end with an error."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads of each process. None: torch's default."""

    device: Device = "auto"
    """auto: a GPU if there is one."""

    peak_tflops: Annotated[float, Gt(0)] | None = None
    """Peak of one device, in 10^12 operations per second of the precision, to which the speed is compared
    (MFU). None: the published one of a GPU that is known, else there is no comparison."""

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
        if self.separate_documents and self.attention_precision == "sdpa-bf16":
            raise ValueError(
                "--separate-documents does not go with --attention-precision sdpa-bf16: PyTorch's flash "
                "kernel has no segments"
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
        self._check_processes()
        for name in ("monitor_row_range", "alarms", "alarm"):
            if getattr(self, name) and not self.monitor_every:
                raise ValueError(f"{flag(name)} needs --monitor-every >= 1, got {self.monitor_every}")
        if self.alarm is not None and self.on_spike is None:
            raise ValueError(f"--alarm goes only with --on-spike, got {self.alarm}")
        for name in ("stop_at_loss", "probe"):
            if getattr(self, name) and not self.evaluate_every:
                raise ValueError(f"{flag(name)} needs --evaluate-every >= 1, got {self.evaluate_every}")
        if self.qk_clip is not None and self.qk_norm:
            raise ValueError(
                f"--qk-clip does not go with --qk-norm, which undoes any scaling, got {self.qk_clip}"
            )
        warmup_steps, schedule_steps, min_learning_rate = self.schedule_or_defaults()
        decay_steps = self.decay_or_default()
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
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"--decay-steps goes only with --schedule wsd, got {self.schedule}")
        if self.schedule == "wsd" and warmup_steps + decay_steps > schedule_steps:
            raise ValueError(
                f"--warmup-steps ({warmup_steps}) and --decay-steps ({decay_steps}) must be at most the "
                f"{schedule_steps} steps of the schedule (--schedule-steps, else --steps) together"
            )

    def _check_processes(self) -> None:
        """Refuse what more than one process cannot do."""
        for name in ("shards", "async_checkpoints"):
            if getattr(self, name) and self.parallel != "fsdp":
                raise ValueError(f"{flag(name)} goes only with --parallel fsdp, got {self.parallel}")
        if self.gather_memory is not None and self.context_parallel == 1:
            raise ValueError(f"--gather-memory goes only with --context-parallel, got {self.gather_memory}")
        if self.context_parallel == 1:
            return
        refused = {
            "--compile": self.compile,
            "--probe": self.probe,
            "--monitor-row-range": self.monitor_row_range,
            "--alarms": self.alarms,
            "--alarm row-range": self.alarm == "row-range",
            "--attention-precision sdpa-bf16": self.attention_precision == "sdpa-bf16",
            "--short-convolution": self.short_convolution is not None,
        }
        for name, is_on in refused.items():
            if is_on:
                raise ValueError(f"{name} does not go with --context-parallel")

    def schedule_or_defaults(self) -> tuple[int, int, float]:
        """Return `warmup_steps`, `schedule_steps` and `min_learning_rate`, defaults filled in."""
        lowest = 0.0 if self.schedule == "wsd" else self.learning_rate / 10
        return (
            min(2000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps,
            self.steps if self.schedule_steps is None else self.schedule_steps,
            lowest if self.min_learning_rate is None else self.min_learning_rate,
        )

    def decay_or_default(self) -> int:
        """Return `decay_steps`, or their default: a tenth of the schedule."""
        return max(1, self.schedule_or_defaults()[1] // 10) if self.decay_steps is None else self.decay_steps

    def model_overrides(self) -> dict[str, Any]:
        """Return the model settings that were given, under the names of `LongShortConfig`."""
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
"""The field of `LongShortConfig` that each model setting overrides."""

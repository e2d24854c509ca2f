"""What the benchmarks of inference measure: the flags of `longshort bench prefill`, `decode` and `memory`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longshort.bench.benchmarking import free_memory
from longshort.bench.inference_providers import PROVIDERS
from longshort.bench.speed_settings import DTYPES, count_threads, require_among, require_any, require_csv
from longshort.checks import require_integer
from longshort.model import preset

if TYPE_CHECKING:
    from longshort.model import LongShortConfig

_SHORTEST, _LONGEST, _LONGEST_ON_CPU = 512, 131_072, 8192
_ALL_SHARE, _ONE_SHARE = 0.6, 0.9  # of the free memory


@dataclass(frozen=True)
class InferenceSettings:
    """What the three benchmarks have in common."""

    providers: tuple[str, ...] = tuple(PROVIDERS)
    """ls, the model with local and global heads; mhsa, the same with every head global; hybrid, whole layers
    local or global, at equal cost of attention; all three on longshort's own kernels; on PyTorch's SDPA
    gpt2, transformers' GPT-2, and mistral, transformers' Mistral, which sees no further than its window."""

    preset: str = "paper-base"
    """Shape of the models: tiny, paper-small, paper-base, paper-large, or a JSON file. Weights are random."""

    lengths: tuple[int, ...] | None = None
    """Tokens per sequence. None: the powers of two from 512 to --max-length."""

    max_length: int | None = None
    """Leave out longer sequences. None: 131072, and 8192 on a CPU, unless --lengths are given."""

    layers: int | None = None
    """Number of layers. None: the preset's."""

    global_heads: int | None = None
    """Global heads of each layer of ls. None: the preset's."""

    window: int | None = None
    """Keys that a query of a local head sees, itself included. None: the preset's."""

    batch: int = 1
    """Sequences."""

    dtype: str = "float32"
    """float32 or bfloat16."""

    threads: int | None = None
    """CPU threads. None: torch's default."""

    device: str = "cpu"
    """cpu or cuda."""

    max_memory_gib: float | None = None
    """GiB that models and caches may take: those that do not fit together are measured apart, those that do
    not fit alone are left out. None: 60 % of the free memory together, 90 % alone."""

    out: Path | None = None
    """CSV file to make; a plot, a .png of the same name, goes beside it. Until the end the rows are in
    OUT.partial. None: only print."""

    overwrite: bool = False
    """Replace the files of OUT."""

    def __post_init__(self) -> None:
        require_among("--providers", self.providers, PROVIDERS)
        require_among("--dtype", (self.dtype,), ("float32", "bfloat16"))
        require_among("--device", (self.device,), ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU that torch can use, and there is none")
        minima = {"batch": 1, "layers": 1, "max_length": 1, "threads": 1, "global_heads": 0, "window": 1}
        for name, minimum in minima.items():
            if getattr(self, name) is not None:
                require_integer("--" + name.replace("_", "-"), getattr(self, name), minimum)
        for length in require_any("--lengths", (1,) if self.lengths is None else self.lengths):
            require_integer("--lengths", length, minimum=1)
        if not self.sweep():
            shortest = _SHORTEST if self.lengths is None else min(self.lengths)
            raise ValueError(
                f"--max-length must be at least the shortest length, {shortest}, got {self.max_length}"
            )
        if self.max_memory_gib is not None and not 0 < self.max_memory_gib < float("inf"):
            raise ValueError(f"--max-memory-gib must be a number > 0, got {self.max_memory_gib}")
        require_csv("--out", self.out)
        self._check_layout(preset(self.preset))
        config = self.config()
        if config.short_convolution is not None:
            raise ValueError("--preset must have no short_convolution, which goes with no cache")
        kinds = {kind for layer in config.head_position_embeddings() for kind in layer}
        for name, is_given in (
            ("softcap", config.softcap is not None),
            ("sink_logits", config.sink_logits),
            ("ALiBi positions", "alibi" in kinds),
            ("attention_precision but 'input'", config.attention_precision != "input"),
        ):
            if is_given:
                raise ValueError(f"--preset must have no {name}: attention alone is measured without it")

    def _check_layout(self, shape: LongShortConfig) -> None:
        """Raises unless the flags fit the preset's heads."""
        if shape.layouts is not None:
            for flag, value in (("--global-heads", self.global_heads), ("--window", self.window)):
                if value is not None:
                    raise ValueError(
                        f"{flag} and the layouts of --preset {self.preset} do not go together, got {value}"
                    )
        heads = shape.num_attention_heads
        group_size = heads // shape.num_key_value_heads
        if self.global_heads is not None and (self.global_heads > heads or self.global_heads % group_size):
            raise ValueError(
                f"--global-heads must be a multiple of the {group_size} query heads that share a key/value "
                f"head, and at most all {heads} heads, got {self.global_heads}"
            )

    def sweep(self) -> list[int]:
        """Each length once, ascending."""
        longest = self.max_length
        if self.lengths is not None:
            return sorted({length for length in self.lengths if longest is None or length <= longest})
        longest = longest or (_LONGEST_ON_CPU if self.device == "cpu" else _LONGEST)
        powers = (2**exponent for exponent in range(_SHORTEST.bit_length() - 1, longest.bit_length()))
        return [length for length in powers if length <= longest]

    def config(self, room: int = 0) -> LongShortConfig:
        """Of the provider `ls`, with positions for the longest sequence and `room` more tokens."""
        overrides: dict[str, Any] = {
            "num_hidden_layers": self.layers,
            "num_global_heads": self.global_heads,
            "local_window": self.window,
            "max_position_embeddings": self.sweep()[-1] + room,
        }
        given = {name: value for name, value in overrides.items() if value is not None}
        return preset(self.preset, **given)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and caches."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def num_threads(self) -> int:
        """CPU threads."""
        return self.threads or torch.get_num_threads()

    def memory_limits(self) -> tuple[float, float]:
        """Bytes that all providers together may take, and one alone, or one with its baseline."""
        if self.max_memory_gib is not None:
            return self.max_memory_gib * 2**30, self.max_memory_gib * 2**30
        free = free_memory(self.torch_device)
        return _ALL_SHARE * free, _ONE_SHARE * free

    def describe(self, length: int) -> str:
        """A setting in words: "512 tokens, batch 1, float32, 2 threads"."""
        where = count_threads(self.num_threads) if self.device == "cpu" else self.device
        return f"{length} tokens, batch {self.batch}, {self.dtype}, {where}"


@dataclass(frozen=True)
class PrefillSettings(InferenceSettings):
    """Time the prompt's way through whole language models of equal size with random weights, in turns.

    Times are wall times. Beside our own models stands Amdahl's bound: the time of the model that they are
    compared with less the attention that they avoid, at that model's own rate.
    """

    rounds: int = 5
    """Rounds that count, after one that warms up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("--rounds", self.rounds, minimum=1)


@dataclass(frozen=True)
class DecodeSettings(InferenceSettings):
    """Time the tokens after a long context, in turns, by whole language models of equal size with random
    weights.

    The context is random keys and values in the caches: none is computed. Times are wall times.
    """

    tokens: int = 8
    """Tokens that a provider decodes in its turn."""

    rounds: int = 5
    """Rounds that count, after one that warms up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("--tokens", self.tokens, minimum=1)
        require_integer("--rounds", self.rounds, minimum=1)

    @property
    def room(self) -> int:
        """Tokens by which the context grows: those of each round, and one for attention alone."""
        return (self.rounds + 1) * (self.tokens + 1)


@dataclass(frozen=True)
class MemorySettings(InferenceSettings):
    """Measure what a prompt adds to the peak of memory, each provider and length in a process of its own.

    The models are language models of equal size with random weights.
    """

    providers: tuple[str, ...] = ("ls", "mhsa", "gpt2")
    """ls, the model with local and global heads; mhsa, the same with every head global; hybrid, whole layers
    local or global, at equal cost of attention; all three on longshort's own kernels; on PyTorch's SDPA
    gpt2, transformers' GPT-2, and mistral, transformers' Mistral, which sees no further than its window."""

    preset: str = "tiny"
    """Shape of the models: tiny, paper-small, paper-base, paper-large, or a JSON file. Weights are random."""

    lengths: tuple[int, ...] | None = (16_384, 32_768, 65_536)
    """Tokens per sequence."""

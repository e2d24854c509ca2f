"""The common part of the benchmarks of whole models: flags, and the choice of models in memory at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from longshort.bench.attention import DTYPES
from longshort.bench.benchmark import (
    Benchmark,
    Case,
    LeaveOut,
    UnsuitableError,
    require_among,
    require_device,
)
from longshort.bench.machine import count_threads, free_memory
from longshort.bench.model_providers import PROVIDERS, Models, Provider, local_windows, prepare_provider
from longshort.bench.sweep import groups_in_memory
from longshort.model import LongShortConfig, preset

_SHORTEST, _LONGEST, _LONGEST_ON_CPU = 512, 131_072, 8192
_ALL_SHARE, _ONE_SHARE = 0.6, 0.9  # of the free memory


class ModelInputs(NamedTuple):
    """The inputs of the providers of a group, the same for each group.

    Attributes:
        generator: random numbers on the device of the models.
        tokens: (batch, new tokens), int64.
        qkv: queries, keys and values for one layer's attention alone, (batch, heads, new tokens, head_dim).
    """

    generator: torch.Generator
    tokens: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ModelBenchmark(Benchmark):
    """The flags of `longshort bench prefill`, `decode` and `memory`."""

    known = tuple(PROVIDERS)
    baseline = "mhsa"

    providers: tuple[str, ...] = tuple(PROVIDERS)
    """ls, the model with local and global heads; mhsa, the same with every head global; hybrid, whole layers
    local or global, at equal cost of attention; all three on longshort's own kernels; on PyTorch's SDPA
    gpt2, transformers' GPT-2, and mistral, transformers' Mistral, which sees no further than its window."""

    preset: str = "paper-base"
    """Shape of the models: tiny, paper-small, paper-base, paper-large, or a JSON file. Weights are random."""

    lengths: tuple[Annotated[int, Ge(1)], ...] | None = None
    """Tokens per sequence. None: the powers of two from 512 to --max-length."""

    max_length: Annotated[int, Ge(1)] | None = None
    """Leave out longer sequences. None: 131072, or 8192 on a CPU, unless --lengths are given."""

    layers: Annotated[int, Ge(1)] | None = None
    """Number of layers. None: the preset's."""

    global_heads: Annotated[int, Ge(0)] | None = None
    """Global heads of each layer of ls. None: the preset's."""

    window: Annotated[int, Ge(1)] | None = None
    """Keys that a query of a local head sees, itself included. None: the preset's."""

    batch: Annotated[int, Ge(1)] = 1
    """Sequences."""

    dtype: str = "float32"
    """float32 or bfloat16."""

    threads: Annotated[int, Ge(1)] | None = None
    """CPU threads. None: torch's default."""

    device: str = "cpu"
    """cpu or cuda."""

    max_memory_gib: Annotated[float, Gt(0)] | None = None
    """GiB that models and caches may take: models that do not fit together are measured separately, those
    that do not fit alone are left out. None: 60 % of the free memory together, 90 % alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_among("--dtype", (self.dtype,), ("float32", "bfloat16"))
        require_device(self.device)
        if not self.sweep():
            shortest = _SHORTEST if self.lengths is None else min(self.lengths)
            raise ValueError(
                f"--max-length must be at least the shortest length, {shortest}, got {self.max_length}"
            )
        self._check_layout(preset(self.preset))
        config = self.config()
        if config.short_convolution is not None:
            raise ValueError("--preset must have no short_convolution, which has no cache")
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
        """Raise a ValueError unless the flags fit the preset's heads."""
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
        """Return each length once, ascending."""
        longest = self.max_length
        if self.lengths is not None:
            return sorted({length for length in self.lengths if longest is None or length <= longest})
        longest = longest or (_LONGEST_ON_CPU if self.device == "cpu" else _LONGEST)
        powers = (2**exponent for exponent in range(_SHORTEST.bit_length() - 1, longest.bit_length()))
        return [length for length in powers if length <= longest]

    @property
    def growth(self) -> int:
        """The tokens by which a sequence grows while it is measured."""
        return 0

    def config(self) -> LongShortConfig:
        """Return the config of the provider `ls`, with positions for the longest sequence and its growth."""
        overrides: dict[str, Any] = {
            "num_hidden_layers": self.layers,
            "num_global_heads": self.global_heads,
            "local_window": self.window,
            "max_position_embeddings": self.sweep()[-1] + self.growth,
        }
        given = {name: value for name, value in overrides.items() if value is not None}
        return preset(self.preset, **given)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and caches."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device of the models."""
        return torch.device(self.device)

    @property
    def num_threads(self) -> int:
        """The number of CPU threads."""
        return self.threads or torch.get_num_threads()

    @cached_property
    def memory_limits(self) -> tuple[float, float]:
        """The most bytes for a group of providers, and for one provider alone or with its baseline; measured
        before any model is built."""
        if self.max_memory_gib is not None:
            return self.max_memory_gib * 2**30, self.max_memory_gib * 2**30
        free = free_memory(self.torch_device)
        return _ALL_SHARE * free, _ONE_SHARE * free

    def cases(self) -> list[Case]:
        config = self.config()
        windows = local_windows(config)
        where = count_threads(self.num_threads) if self.device == "cpu" else self.device
        layers = config.num_hidden_layers
        setting = f"batch {self.batch}, {self.dtype}, {where}, {self.preset}, layers: {layers}"
        columns = {
            "batch": self.batch,
            "dtype": self.dtype,
            "threads": self.num_threads,
            "device": self.device,
            "preset": self.preset,
            "layers": layers,
            "heads": config.num_attention_heads,
            "global_heads": sum(len(layout.global_heads) for layout in config.head_layouts()),
            "window": windows[0] if len(windows) == 1 else None,
        }  # the heads of ls, over all layers
        return [Case(length, setting, self.num_threads, columns) for length in self.sweep()]

    @cached_property
    def models(self) -> Models:
        """The models that are in memory."""
        return Models(self.torch_device, self.torch_dtype)

    def provider(self, name: str) -> Provider:
        """Return the description of a provider."""
        return prepare_provider(name, self.config())

    @abstractmethod
    def memory_of(self, provider: Provider, length: int) -> tuple[int, int]:
        """Return the bytes that a provider takes while its group exists, and those that its turn adds."""

    def groups(self, case: Case, leave_out: LeaveOut) -> list[list[str]]:
        taken = {}
        for name in dict.fromkeys(self.providers):
            try:
                taken[name] = self.memory_of(self.provider(name), case.x)
            except UnsuitableError as error:
                leave_out(name, str(error))

        def need(names: Sequence[str]) -> int:
            lasting, passing = zip((0, 0), *(taken[name] for name in names), strict=True)
            return sum(lasting) + max(passing)

        together, alone = self.memory_limits
        return groups_in_memory(taken, need, together, alone, ("ls", "mhsa"), leave_out)

    def inputs(self, case: Case, group: Sequence[str]) -> ModelInputs:
        self.models.keep(group)
        config, device = self.config(), self.torch_device
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch, self.new_tokens(case.x))
        tokens = torch.randint(config.vocab_size, shape, generator=generator, device=device)

        def random(heads: int) -> Tensor:
            sizes = (self.batch, heads, shape[1], config.head_dim)
            return torch.randn(sizes, generator=generator, device=device, dtype=self.torch_dtype)

        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return ModelInputs(generator, tokens, (random(heads), random(kv_heads), random(kv_heads)))

    def new_tokens(self, length: int) -> int:
        """Return the number of tokens of a sequence that pass through a model at once."""
        return length

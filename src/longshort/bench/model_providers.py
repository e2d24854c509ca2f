"""Language models with random weights, of equal size, prepared to be timed against each other.

- `ls`: `LongShortForCausalLM`; `mhsa`: the same with every head global. Both run longshort's own kernels.
- `hybrid`: the same with whole layers local or global, as Gemma 3 has them: as many global heads in the model
  as `ls` has, so that attention costs as much. The last layer of each period is the global one.
- `gpt2`: transformers' `GPT2LMHeadModel` with SDPA and exact GELU. Its projections have biases.
- `mistral`: transformers' `MistralForCausalLM` with SDPA, where every layer has the window: no query sees
  beyond it in one layer. Its gated MLP has 2/3 of the width, so the same number of weights; its positions are
  rotary.
  transformers gives SDPA a mask of length × length.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from longshort.attention import attention
from longshort.bench.attention_providers import visible_pairs
from longshort.bench.benchmark import UnsuitableError
from longshort.huggingface import SplitCache
from longshort.layout import HeadLayout
from longshort.model import LongShortConfig, LongShortForCausalLM, hybrid_layers, prefill_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers.cache_utils import Cache

    from longshort.bench.attention_providers import Attend

BASELINES = ("mhsa", "gpt2")
"""The providers that the others are compared with."""

OURS = ("ls", "mhsa", "hybrid")
"""The providers whose attention runs on longshort's kernels."""


@dataclass(frozen=True)
class Provider:
    """A language model that can be built, and its attention alone.

    Attributes:
        name: a key of `PROVIDERS`.
        model_class, config: class and config of the model.
        layouts: layout of the heads of each layer.
        head_dim: width of a head.
        intermediate_size: weights of an MLP / (2 · hidden size).
    """

    name: str
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    layouts: tuple[HeadLayout, ...]
    head_dim: int
    intermediate_size: int

    @property
    def is_ours(self) -> bool:
        """Whether `longshort.attention` computes its attention."""
        return self.model_class is LongShortForCausalLM

    def build(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """Build the model in eval mode, with the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model_class(self.config)
        return model.to(device=device, dtype=dtype).eval()  # type: ignore[arg-type]

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Count the bytes of the parameters without allocating them."""
        with torch.device("meta"):
            return self.model_class(self.config).num_parameters() * dtype.itemsize

    def kv_bytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        """Count the bytes of keys and values that decoding needs after `length` tokens."""
        return batch * sum(layout.kv_bytes(length, self.head_dim, dtype) for layout in self.layouts)

    def mask_bytes(self, length: int) -> int:
        """Count the bytes of the boolean mask of visible pairs, if the provider needs one."""
        windows = () if self.is_ours else self.layouts[0].windows
        return length**2 * any(window is not None and window < length for window in windows)

    def working_bytes(self, length: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
        """Estimate the peak bytes of a prefill beside weights and cache: an MLP, and a mask if any."""
        widths = 2 * self.intermediate_size + 6 * self.config.hidden_size
        working = batch * length * dtype.itemsize * widths
        if self.is_ours:
            return min(working, prefill_limit(device.type))
        return working + (1 + dtype.itemsize) * self.mask_bytes(length)  # SDPA converts booleans to numbers

    def attend(self, layout: HeadLayout, length: int, device: torch.device) -> Attend:
        """Return the attention of a layer with these heads, q, k, v -> out; any mask is built here."""
        if self.is_ours:
            return lambda q, k, v: attention(q, k, v, layout)
        grouped, window = layout.group_size > 1, layout.windows[0]
        if window is None or window >= length:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        mask = visible_pairs(HeadLayout((window,)), length, device)[None]
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    def filled_cache(
        self, model: PreTrainedModel, batch: int, length: int, growth: int, generator: torch.Generator
    ) -> Cache:
        """Make a cache with `length` tokens of random keys and values, the same in every layer.

        Args:
            model: the result of `build`.
            batch, length: number of sequences, and tokens of each.
            growth: number of tokens that will be appended.
            generator: random numbers on the model's device.
        """
        ours = isinstance(model, LongShortForCausalLM)
        fixed = length + growth if model.device.type == "cuda" else None  # for a CUDA graph
        cache = model.new_cache(max_length=fixed) if ours else DynamicCache(config=self.config)
        shape = (batch, self.layouts[0].num_kv_heads, length, self.head_dim)
        k, v = (
            torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        if isinstance(cache, SplitCache):
            cache.expect(length + growth)
            for layer in cache.layers:
                layer.cache.append(k, v)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            for index in range(len(self.layouts)):
                cache.update(k, v, index)
        return cache


def bytes_of_weights_read(model: PreTrainedModel) -> int:
    """Count the bytes of the parameters that a token reads: all but the embedding tables, of which it reads
    a row; a tied table is read as the head."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    assert head is not None
    tables.discard(id(head.weight))
    return sum(x.nbytes for x in model.parameters() if id(x) not in tables)


def prepare_provider(name: str, config: LongShortConfig) -> Provider:
    """Describe a provider of `PROVIDERS`; nothing is built.

    Args:
        name: name of the provider.
        config: config of `ls`, to which the other models are fitted.

    Raises:
        UnsuitableError: the provider cannot be fitted to it.
    """
    return PROVIDERS[name](name, config)


def _ours(name: str, config: LongShortConfig) -> Provider:
    return Provider(
        name,
        LongShortForCausalLM,
        config,
        tuple(config.head_layouts()),
        config.head_dim,
        config.intermediate_size,
    )


def _all_global(name: str, config: LongShortConfig) -> Provider:
    return _ours(name, _with_heads(config, config.num_attention_heads, config.local_window or 1))


def _hybrid(name: str, config: LongShortConfig) -> Provider:
    layouts, heads = config.head_layouts(), config.num_attention_heads
    global_heads = sum(len(layout.global_heads) for layout in layouts)
    if global_heads % heads:
        raise UnsuitableError(
            f"{global_heads} global heads in {len(layouts)} layers do not make a whole number of layers with "
            f"{heads} heads each: choose --layers or --global-heads"
        )
    whole = hybrid_layers(global_heads // heads, len(layouts))
    per_layer = [heads if layer in whole else 0 for layer in range(len(layouts))]
    return _ours(name, _with_heads(config, per_layer, _one_window(config) or 1))


def _gpt2(name: str, config: LongShortConfig) -> Provider:
    heads = config.num_attention_heads
    if config.num_key_value_heads != heads or config.head_dim * heads != config.hidden_size:
        raise UnsuitableError("GPT-2 has a key/value head for each head, and hidden_size / heads as head_dim")
    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=heads,
        n_inner=config.intermediate_size,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_shared(config),
    )
    layouts = (HeadLayout((None,) * heads),) * config.num_hidden_layers
    return Provider(name, GPT2LMHeadModel, theirs, layouts, config.head_dim, config.intermediate_size)


def _mistral(name: str, config: LongShortConfig) -> Provider:
    window = _one_window(config)
    if window is None:
        raise UnsuitableError("Mistral's window is that of the local heads, and there are none")
    if window == 1:
        raise UnsuitableError("transformers' sliding cache cannot keep a window of 1")
    theirs = MistralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=max(1, round(2 * config.intermediate_size / 3)),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        sliding_window=window,
        **_shared(config),
    )
    layout = HeadLayout((window,) * config.num_attention_heads, config.num_key_value_heads)
    layouts = (layout,) * config.num_hidden_layers
    return Provider(name, MistralForCausalLM, theirs, layouts, config.head_dim, config.intermediate_size)


class Models:
    """The models in memory, kept from one group to the next if they are needed again."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._built: dict[str, PreTrainedModel] = {}

    def keep(self, names: Sequence[str]) -> None:
        """Free the models of all other names."""
        self._built = {name: model for name, model in self._built.items() if name in names}
        gc.collect()

    def of(self, provider: Provider) -> PreTrainedModel:
        """Return the model of a provider, built unless it was kept."""
        if provider.name not in self._built:
            self._built[provider.name] = provider.build(self._device, self._dtype)
        return self._built[provider.name]


def local_windows(config: LongShortConfig) -> list[int]:
    """Return the windows of local heads, ascending; none if every head is global."""
    return sorted({w for layout in config.head_layouts() for w in layout.windows if w is not None})


def _one_window(config: LongShortConfig) -> int | None:
    windows = local_windows(config)
    if len(windows) > 1:
        raise UnsuitableError(f"all local heads must have one window, got {windows}")
    return windows[0] if windows else None


def _with_heads(
    config: LongShortConfig, global_heads: int | list[int], window: int | list[int]
) -> LongShortConfig:
    changed = copy.deepcopy(config)
    changed.num_global_heads, changed.local_window, changed.layouts = global_heads, window, None
    changed.check()
    return changed


def _shared(config: LongShortConfig) -> dict[str, Any]:
    return {
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }


PROVIDERS: dict[str, Callable[[str, LongShortConfig], Provider]] = {
    "ls": _ours,
    "mhsa": _all_global,
    "hybrid": _hybrid,
    "gpt2": _gpt2,
    "mistral": _mistral,
}
"""The function that describes each provider, by name. Attention of `ls`, `mhsa` and `hybrid` is computed by
longshort's kernels, that of `gpt2` and `mistral` by PyTorch's SDPA."""

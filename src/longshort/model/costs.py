"""The costs of a model: operations, parameters and cached bytes, counted from its config."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longshort.checks import require_integer
from longshort.model.config import LongShortConfig
from longshort.model.modeling import LongShortForCausalLM


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; one multiply-add counts as two.

    Norms, softmax, activations, positions, short convolutions and residual sums are not counted, nor is
    whatever a backend computes of pairs that are not visible.

    Attributes:
        matrices: the blocks' projections and MLPs, 2 · weights · tokens.
        attention: q·k and p·v, 4 · head_dim for each visible pair of a query and a key.
        lm_head: the logits, 2 · hidden_size · vocab_size · tokens.
    """

    matrices: int
    attention: int
    lm_head: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.matrices + self.attention + self.lm_head

    def times(self, count: int) -> Flops:
        """Multiply each number by `count`."""
        return Flops(count * self.matrices, count * self.attention, count * self.lm_head)


def forward_flops(config: LongShortConfig, length: int) -> Flops:
    """Count the operations of a forward pass of one sequence of `length` tokens, with logits for every token.

    The sequence is one segment.

    Raises:
        ValueError: length is not an integer >= 0.
    """
    require_integer("length", length, minimum=0)
    return _last_tokens_flops(config, length, length)


def prefill_flops(config: LongShortConfig, length: int) -> Flops:
    """Count the operations of reading a prompt of `length` tokens, one segment, logits for its last token.

    Raises:
        ValueError: length is not an integer >= 0.
    """
    return replace(forward_flops(config, length), lm_head=forward_flops(config, min(length, 1)).lm_head)


def decode_flops(config: LongShortConfig, length: int) -> Flops:
    """Count the operations of decoding one token after `length` others, whose keys and values are cached.

    Raises:
        ValueError: length is not an integer >= 0.
    """
    require_integer("length", length, minimum=0)
    return _last_tokens_flops(config, 1, length + 1)


def training_flops(config: LongShortConfig, length: int) -> Flops:
    """Count the operations of training on one sequence: three times the forward pass, since the gradient of a
    product is two products of its size. What a backend or gradient checkpointing recomputes is not counted.

    Raises:
        ValueError: length is not an integer >= 0.
    """
    return forward_flops(config, length).times(3)


def parameter_count(config: LongShortConfig) -> int:
    """Count the parameters of `LongShortForCausalLM`, embeddings included, a tied matrix once.

    No memory is allocated.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LongShortForCausalLM(config).parameters())


def kv_bytes(config: LongShortConfig, length: int, dtype: torch.dtype) -> int:
    """Count the bytes of keys and values, over all layers, that must be kept to decode after `length` tokens
    of one sequence: the last `window` and the sink tokens of a local head, all of a global head.

    Raises:
        ValueError: length is not an integer >= 0.
        TypeError: dtype is not a torch.dtype.
    """
    return sum(layout.kv_bytes(length, config.head_dim, dtype) for layout in config.head_layouts())


def _last_tokens_flops(config: LongShortConfig, new: int, length: int) -> Flops:
    """Count the operations on the last `new` of `length` tokens, logits for each of them."""
    layouts = config.head_layouts()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention_weights = (2 * heads + 2 * kv_heads) * config.head_dim * config.hidden_size
    mlp_weights = 2 * config.hidden_size * config.intermediate_size
    return Flops(
        matrices=2 * len(layouts) * (attention_weights + mlp_weights) * new,
        attention=4 * config.head_dim * sum(layout.score_count(new, length) for layout in layouts),
        lm_head=2 * config.hidden_size * config.vocab_size * new,
    )

"""Tiny decoders of transformers with random weights, and the truth about their attention logits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY = 64

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip

_FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    # name: class, changes of the shape, and what the config does not know
    "llama": ("Llama", {"attention_bias": True}, set()),
    "mistral": ("Mistral", {"sliding_window": 5}, set()),
    "qwen3": ("Qwen3", {}, set()),
    "gemma2": (
        "Gemma2", {"sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, set()
    ),
    "phi3": ("Phi3", {}, {"head_dim"}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5}, {"head_dim", "num_key_value_heads"}),
    "olmo2": ("Olmo2", {}, {"head_dim"}),
    "gpt-oss": ("GptOss", {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1}, set()),
    "deepseek-v3": ("DeepseekV3", {**_LATENT, **_EXPERTS}, set()),
    "qwen3-next": ("Qwen3Next", {**_LINEAR, **_EXPERTS}, set()),
}  # fmt: skip
FAMILIES = ["gpt2", *_FAMILIES]


def make_decoder(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model in training mode without dropout, whose weights are large enough for uneven attention."""
    torch.manual_seed(seed)
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, scale_attn_by_inverse_layer_idx=True, **changes,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        name, special, unknown = _FAMILIES[family]
        settings = {key: value for key, value in _SHAPE.items() if key not in unknown} | special | changes
        config = getattr(transformers, f"{name}Config")(**settings)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@dataclass
class Captured:
    """One call of eager attention."""

    module: nn.Module
    q: Tensor
    k: Tensor
    mask: Tensor
    scale: float
    softcap: float | None


def capture_eager(model: Any, *args: Any, **kwargs: Any) -> list[Captured]:
    """Run a model with eager attention of its own; return what its layers were given."""
    found: list[Captured] = []
    before = model.config._attn_implementation

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
        scale = options.get("scaling")
        scale = q.shape[3] ** -0.5 if scale is None else scale
        found.append(Captured(module, q, k, mask, scale, options.get("softcap")))
        own: Any = sys.modules[type(module).__module__]
        return own.eager_attention_forward(module, q, k, v, mask, **options)

    model.set_attn_implementation("eager")
    ALL_ATTENTION_FUNCTIONS["eager"] = attend
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
        model.set_attn_implementation(before)
    return found


@dataclass
class Truth:
    """By head: the largest size of a logit, the mean entropy of the rows, and the largest range of a row."""

    max_logit: list[float]
    entropy: list[float]
    row_range: list[float]


def truth(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Truth:
    """Compute the statistics from all n×n logits, row by row."""
    heads = q.shape[1]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    logits = scale * (q @ k.mT)
    visible = visible.expand_as(logits)
    biases = torch.zeros_like(logits) if bias is None else bias.expand_as(logits)
    found = Truth([], [], [])
    for head in range(heads):
        largest, entropies, widest = 0.0, [], 0.0
        for entry in range(q.shape[0]):
            for row in range(q.shape[2]):
                seen = visible[entry, head, row]
                if not seen.any():
                    continue
                z = logits[entry, head, row][seen]
                largest = max(largest, z.abs().max().item())
                widest = max(widest, (z.max() - z.min()).item())
                scores = z if softcap is None else softcap * torch.tanh(z / softcap)
                p = (scores + biases[entry, head, row][seen]).softmax(-1)
                entropies.append(torch.special.entr(p).sum().item())
        found.max_logit.append(largest)
        found.entropy.append(sum(entropies) / max(1, len(entropies)))
        found.row_range.append(widest)
    return found


def truth_of(call: Captured, dtype: torch.dtype | None = torch.float64) -> Truth:
    """The truth about a call of eager attention, whose mask is a bias; with None in the precision of the
    call."""
    visible = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
    return truth(call.q.to(dtype), call.k.to(dtype), visible, call.scale, call.softcap)


make_llama: Callable[..., Any] = functools.partial(make_decoder, "llama")

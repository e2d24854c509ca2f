"""Small decoders of transformers with random weights, and the masks that layouts stand for."""

import sys
from typing import Any

import torch
import transformers as hf

from longshort import HeadLayout

VOCAB = 61
LOWEST = torch.finfo(torch.float32).min
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA: dict[str, Any] = {
    **_COMMON, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "head_dim": 8,
}  # fmt: skip
_FULL_HEADS: dict[str, Any] = {**_LLAMA, "num_key_value_heads": 6}
_GPT2: dict[str, Any] = {
    **_COMMON, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256, "attn_pdrop": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, sliding_window=11),
    "gemma2": lambda: hf.Gemma2Config(
        **_LLAMA, sliding_window=11, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_LLAMA, sliding_window=11, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{**_FULL_HEADS, "head_dim": None}),
    "olmo2": lambda: hf.Olmo2Config(**_LLAMA),
    "phi3": lambda: hf.Phi3Config(**_LLAMA, sliding_window=11),
    "gpt_oss": lambda: hf.GptOssConfig(**_LLAMA, **_MOE, sliding_window=11),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**_FULL_HEADS, "head_dim": 8}, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
    ),
    "stablelm": lambda: hf.StableLmConfig(**_LLAMA),
    "opt": lambda: hf.OPTConfig(
        **_COMMON, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=6,
        max_position_embeddings=256, word_embed_proj_dim=48, dropout=0.0,
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **_LLAMA, **_MOE, intermediate_size_mlp=64, attention_chunk_size=16, no_rope_layers=[1, 0],
    ),
    "lfm2": lambda: hf.Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"]),
}  # fmt: skip
"""Configs by family: GQA, QK-norm, sliding windows, softcap, fused projections, sinks, MLA, layers without
attention."""


def make_decoder(family, **changes) -> Any:
    """Return a small model in eval mode, with larger weights than usual, so that attention is not uniform."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if model.can_generate():
        model.generation_config.eos_token_id = None  # which a None of the caller's would not override
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(3.0)
            elif "sinks" in name:
                parameter.normal_()
    return model


def make_seeing_decoder() -> Any:
    """Return a small model that also sees, in eval mode."""
    text = CONFIGS["gemma3"]()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=60
    )
    torch.manual_seed(0)
    return hf.Gemma3ForConditionalGeneration(config).eval()


def visible(layout: HeadLayout, segment_ids):
    """(batch, heads, n, n): what each head of a layout sees, by the definition."""
    length = segment_ids.shape[1]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    alike = (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids >= 0)[:, None]
    rank = ((segment_ids[:, :, None] == segment_ids[:, None]) & (j < i)).sum(-1)  # within its segment
    masks = []
    for window in layout.windows:
        near = torch.ones_like(alike) if window is None else (i - j < window).expand_as(alike)
        masks.append((near | (rank < layout.sink_tokens)[:, None]) & alike & (j <= i))
    return torch.stack(masks, dim=1)


def attend_by_masks(model, layouts, segment_ids):
    """Let a model attend by its own eager function under explicit masks, one per head; undone by nothing."""
    kinds = getattr(model.config, "layer_types", None) or [""] * len(layouts)
    position = torch.arange(segment_ids.shape[1])
    masks = []
    for layout, kind in zip(layouts, kinds, strict=True):
        segments = segment_ids
        if "chunked" in kind:
            segments = segment_ids + 100 * (position // model.config.attention_chunk_size)
        masks.append(None if layout is None else torch.where(visible(layout, segments), 0.0, LOWEST))

    def attend(module, query, key, value, attention_mask, **options):
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, masks[module.layer_idx], **options)

    hf.AttentionInterface.register("by masks", attend)
    hf.AttentionMaskInterface.register("by masks", lambda *args, **options: None)
    model.set_attn_implementation("by masks")
    return model

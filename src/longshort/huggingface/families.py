"""A trial of layouts, caches, monitor and clip on a small model of each family of transformers' decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longshort.huggingface.apply import apply, attention_layers
from longshort.huggingface.loading import first_line
from longshort.huggingface.qk_clip import QKClip
from longshort.huggingface.state import stored_state, text_config
from longshort.huggingface.watch import LogitMonitor
from longshort.layout import HeadLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

_LARGEST = 30_000_000  # parameters; models that stay larger with small settings are not built

_PROMPT, _NEW = 40, 8  # tokens, beyond all windows and chunks

_WINDOW, _SINK_TOKENS = 3, 2
_ROUNDING = 1e-5
"""Differences of logits that are none, relative to the largest; windows change them by far more."""

_LAYERS, _HEADS, _HEAD_DIM, _WIDTH = 4, 4, 16, 64

# Attributes of configs, as one family or another calls them.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "mamba_n_heads"), _HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob",), 0.0),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "mamba_d_state", "ssm_state_size"), 8),
    "num_key_value_heads": 2, "head_dim": _HEAD_DIM, "num_experts_per_tok": 2, "v_head_dim": 12,
    "sliding_window": 6, "attention_chunk_size": 16, "mamba_d_head": 32, "hidden_size_per_layer_input": 8,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class FamilySupport:
    """The results for a family: None for what works, else the reason why not.

    Attributes:
        model_type: the name of the family in transformers.
        use: `apply`.
        cache: `generate()` with a `SplitCache`.
        watch: `LogitMonitor`, with the model's own attention.
        clip: `QKClip`.
    """

    model_type: str
    use: str | None
    cache: str | None
    watch: str | None
    clip: str | None


def family_names() -> list[str]:
    """Return the model types of transformers' causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_decoder(model_type: str, *, is_sliding: bool = False) -> PreTrainedModel:
    """Build a small model of a family with random weights, the same each time.

    Args:
        model_type: as transformers calls the family.
        is_sliding: give it sliding layers, which its default config has not.

    Raises:
        ValueError: no small model can be built by general settings.
    """
    try:
        config = _small_config(model_type, is_sliding)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > _LARGEST:
            raise ValueError(f"it has {size:,} parameters with small settings")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # whatever a family's code raises for settings that it was not made for
        raise ValueError(f"no small model could be built: {first_line(error)}") from error


def _small_config(model_type: str, is_sliding: bool) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    config = kind()
    if config.get_text_config(decoder=True) is not config:
        raise ValueError("its decoder is a part of it; try the type of the part")
    settings = {
        name: value for name, value in _SMALL.items()
        if getattr(config, name, None) is not None and not isinstance(getattr(kind, name, None), property)
    }  # fmt: skip
    settings |= {name: value for name, value in _TOKENS.items() if hasattr(config, name)}
    if "kv_lora_rank" in settings:  # multi-head latent attention: each head has its own keys
        settings |= {"num_key_value_heads": _HEADS, "head_dim": settings.get("qk_rope_head_dim", _HEAD_DIM)}
    unset = (
        "head_dim",
        "num_experts_per_tok",
        "num_key_value_heads",
    )  # without a default, though some of these families need them
    settings |= {
        name: _SMALL[name] for name in unset if getattr(config, name, 0) is None and name not in settings
    }
    kinds = getattr(config, "layer_types", None)
    computed = (getattr(kind, name, None) for name in ("layer_types", "layers_block_type"))
    if kinds and not any(isinstance(attribute, property) for attribute in computed):
        settings["layer_types"] = (list(dict.fromkeys(kinds)) * _LAYERS)[:_LAYERS]
    if is_sliding:
        sliding = {
            "use_sliding_window": True,
            "sliding_window": _SMALL["sliding_window"],
            "layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2),
        }
        settings |= {name: value for name, value in sliding.items() if hasattr(config, name)}
    return kind(**settings)


def _may_slide(config: PreTrainedConfig) -> bool:
    """Return whether a family has sliding layers that its default config has not."""
    is_full = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    return is_full and hasattr(config, "sliding_window") and not config.sliding_window


def family_support(model_type: str) -> FamilySupport:
    """Try a small model of a family.

    Raises:
        ValueError: no small model can be built.
    """
    model = small_decoder(model_type)
    support = _support_of(model_type, model)
    if not _may_slide(model.config):
        return support
    try:
        sliding = _support_of(model_type, small_decoder(model_type, is_sliding=True))
    except ValueError:  # the config has the setting and refuses it
        return support
    columns = {
        name: own if own is not None or theirs is None else f"with sliding layers: {theirs}"
        for name, own, theirs in (
            (name, getattr(support, name), getattr(sliding, name))
            for name in ("use", "cache", "watch", "clip")
        )
    }
    return FamilySupport(model_type, **columns)


def _support_of(model_type: str, model: PreTrainedModel) -> FamilySupport:
    watch, clip = _error_of(_watch, model), _error_of(QKClip, model)
    use = _error_of(_give_layouts, model)
    cache = "it has no layouts" if use is not None else _error_of(_generate, model)
    return FamilySupport(model_type, use, cache, watch, clip)


def _error_of(attempt: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> str | None:
    try:
        attempt(model)
    except Exception as error:  # a family's own code may raise anything
        return first_line(error)
    return None


def _watch(model: PreTrainedModel) -> None:
    with torch.no_grad(), LogitMonitor(model) as monitor:
        model(input_ids=torch.arange(3, 3 + _PROMPT)[None], use_cache=False)
    monitor.reading()


@torch.no_grad()
def _give_layouts(model: PreTrainedModel) -> None:
    """Let all heads of the first layer be local, and one KV head of others global; the logits must differ."""
    ids = torch.arange(3, 3 + _PROMPT)[None]
    layers = attention_layers(model)
    layouts: list[HeadLayout | None] = [None] * text_config(model).num_hidden_layers
    for layer in layers:
        size = layer.num_heads // layer.num_kv_heads
        num_global = 0 if layer is layers[0] else size
        layouts[layer.index] = HeadLayout.split(
            layer.num_heads, num_global, _WINDOW, layer.num_kv_heads, _SINK_TOKENS
        )
    own = model(input_ids=ids, use_cache=False).logits
    apply(model, layouts)
    given = model(input_ids=ids, use_cache=False).logits
    if (given - own).abs().max() <= _ROUNDING * own.abs().max():
        raise ValueError("its logits are the same with windows as without")


def _generate(model: Any) -> None:
    """Compare the text of `generate()` with a `SplitCache` and without a cache."""
    state = stored_state(text_config(model))
    if state is not None and state["cache"] is not None:
        raise ValueError(state["cache"])
    ids = torch.arange(3, 3 + _PROMPT)[None]
    settings = GenerationConfig(max_new_tokens=_NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    outputs = []
    for uses_cache in (True, False):
        settings.use_cache = uses_cache
        outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings))
    if not torch.equal(*outputs):
        raise ValueError("the text is another with the cache")

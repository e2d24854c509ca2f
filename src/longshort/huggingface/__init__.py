"""LS-attention in the decoders of Hugging Face transformers: layouts, caches and masks; logits watched and
clipped.

The import registers the attention implementation "longshort", so that models that were saved with layouts
load.
"""

from longshort.extras import require

require("longshort.huggingface", "transformers", "safetensors")

from longshort.huggingface.apply import AttentionLayer, apply, attention_layers, remove
from longshort.huggingface.cache import CACHE_NAME as CACHE_NAME  # for longshort.model
from longshort.huggingface.cache import GrowingLayer, SplitCache, layer_caches
from longshort.huggingface.distribution import distribute, gather_layers
from longshort.huggingface.generation import split_cache, use_split_caches
from longshort.huggingface.interface import register
from longshort.huggingface.model_card import CardFacts, Measurement, push_to_hub, write_model_card
from longshort.huggingface.qk_clip import QKClip
from longshort.huggingface.segments import segment_ids_from
from longshort.huggingface.state import keep_with_config, layouts_of
from longshort.huggingface.watch import LogitMonitor

__all__ = [
    "AttentionLayer",
    "CardFacts",
    "GrowingLayer",
    "LogitMonitor",
    "Measurement",
    "QKClip",
    "SplitCache",
    "apply",
    "attention_layers",
    "distribute",
    "gather_layers",
    "layer_caches",
    "layouts_of",
    "push_to_hub",
    "remove",
    "segment_ids_from",
    "split_cache",
    "write_model_card",
]

register()
keep_with_config()
use_split_caches()

"""The bridge to Hugging Face transformers: its masks and caches in longshort's words."""

from longshort.huggingface.cache import GrowingLayer, SplitCache, layer_caches
from longshort.huggingface.segments import segment_ids_from

__all__ = ["GrowingLayer", "SplitCache", "layer_caches", "segment_ids_from"]

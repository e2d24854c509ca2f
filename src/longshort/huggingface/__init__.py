"""The bridge to Hugging Face transformers: its masks and caches in longshort's words, and
logits of any decoder watched and clipped."""

from longshort.huggingface.cache import GrowingLayer, SplitCache, layer_caches
from longshort.huggingface.qk_clip import QKClip
from longshort.huggingface.segments import segment_ids_from
from longshort.huggingface.watch import LogitMonitor

__all__ = ["GrowingLayer", "LogitMonitor", "QKClip", "SplitCache", "layer_caches", "segment_ids_from"]

"""The bridge to Hugging Face transformers: its masks and caches in longshort's words."""

from longshort.huggingface.cache import LayerCache
from longshort.huggingface.segments import segment_ids_from

__all__ = ["LayerCache", "segment_ids_from"]

"""KV caches with a ring for each window and a growing store for global heads; needs torch alone."""

from longshort.cache.layer import LayerCache

__all__ = ["LayerCache"]

"""Watching attention while a model trains."""

from longshort.stability.monitor import MAX_LOGITS, AttentionMonitor, Reading

__all__ = ["MAX_LOGITS", "AttentionMonitor", "Reading"]

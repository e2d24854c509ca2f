"""LS-attention for PyTorch: heads split into many short-range and a few long-range ones."""

from longshort.attention import AttentionStats, Explanation, attention, explain
from longshort.layers import LongShortAttention, Rotary
from longshort.layout import HeadGroup, HeadLayout

__version__ = "0.1.0"

__all__ = [
    "AttentionStats",
    "Explanation",
    "HeadGroup",
    "HeadLayout",
    "LongShortAttention",
    "Rotary",
    "attention",
    "explain",
]

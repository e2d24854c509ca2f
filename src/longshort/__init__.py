"""LS-attention for PyTorch: heads split into many short-range and a few long-range ones.

Names are imported when they are first used, so that `longshort --help` need not wait for torch.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from longshort.lazy import lazy_names

if TYPE_CHECKING:
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AttentionStats": "attention",
        "Explanation": "attention",
        "HeadGroup": "layout",
        "HeadLayout": "layout",
        "LongShortAttention": "layers",
        "Rotary": "layers",
        "attention": "attention",
        "explain": "attention",
    },
)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a submodule as an attribute once it is imported; `attention` stays the function.
        is_module = name == "attention" and isinstance(value, ModuleType)
        super().__setattr__(name, value.attention if is_module else value)


sys.modules[__name__].__class__ = _Package

"""LS-attention for PyTorch: heads split into many short-range and a few long-range ones.

Names are imported when they are first used, so that `longshort --help` need not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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

_MODULES = {"LongShortAttention": "layers", "Rotary": "layers", "HeadGroup": "layout", "HeadLayout": "layout"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'attention')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a submodule as an attribute once it is imported; `attention` stays the function.
        is_module = name == "attention" and isinstance(value, ModuleType)
        super().__setattr__(name, value.attention if is_module else value)


sys.modules[__name__].__class__ = _Package

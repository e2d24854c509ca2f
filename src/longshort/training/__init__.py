"""Training: the settings (`config`), the folder of a run (`run`), the loop (`loop`) and its parts.

Names are imported when they are first used, so that `longshort train --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longshort.extras import require

require(
    "longshort.training",
    *("annotated-types", "jinja2", "matplotlib", "numpy", "safetensors", "tokenizers", "transformers"),
)

if TYPE_CHECKING:
    from longshort.training.config import TrainConfig
    from longshort.training.display import TrainingDisplay
    from longshort.training.loop import resume, train
    from longshort.training.metrics import read_metrics
    from longshort.training.progress import Progress, RunOutcome
    from longshort.training.trained import TrainedModel, open_trained

__all__ = [
    "Progress",
    "RunOutcome",
    "TrainConfig",
    "TrainedModel",
    "TrainingDisplay",
    "open_trained",
    "read_metrics",
    "resume",
    "train",
]

_MODULES = {
    "Progress": "progress",
    "RunOutcome": "progress",
    "TrainConfig": "config",
    "TrainedModel": "trained",
    "TrainingDisplay": "display",
    "open_trained": "trained",
    "read_metrics": "metrics",
    "resume": "loop",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Training: the settings (`config`), the folder of a run (`run`), the loop (`loop`) and its parts.

Names are imported when they are first used, since the command line reads settings without the rest.
"""

from typing import TYPE_CHECKING

from longshort.extras import require
from longshort.lazy import lazy_names

require(
    "longshort.training", "annotated-types", "jinja2", "matplotlib", "numpy", "rich", "safetensors",
    "tokenizers", "transformers",
)  # fmt: skip

if TYPE_CHECKING:
    from longshort.training.audit import audit_trained
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
    "audit_trained",
    "open_trained",
    "read_metrics",
    "resume",
    "train",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Progress": "progress",
        "RunOutcome": "progress",
        "TrainConfig": "config",
        "TrainedModel": "trained",
        "TrainingDisplay": "display",
        "audit_trained": "audit",
        "open_trained": "trained",
        "read_metrics": "metrics",
        "resume": "loop",
        "train": "loop",
    },
)

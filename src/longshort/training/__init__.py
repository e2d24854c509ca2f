"""Training: the settings (`config`), the folder of a run (`run`), the loop (`loop`) and its parts."""

from longshort.extras import require

require(
    "longshort.training",
    *("annotated-types", "jinja2", "matplotlib", "numpy", "safetensors", "tokenizers", "transformers"),
)

"""Conversion of trained decoders: which heads need distant tokens, a smaller cache, and healing."""

from longshort.extras import require

require(
    "longshort.conversion",
    *("annotated-types", "matplotlib", "numpy", "safetensors", "tokenizers", "transformers"),
)

import longshort.model  # noqa: F401  # lets transformers load longshort's own models

"""Conversion of trained decoders: which heads need the distance, a smaller cache, and healing."""

import longshort.model  # noqa: F401  # lets transformers load longshort's own models

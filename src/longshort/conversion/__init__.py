"""Conversion of trained decoders: which heads need the distance, a smaller cache, and healing."""

"""Backends: one module per way to compute attention over a head layout."""

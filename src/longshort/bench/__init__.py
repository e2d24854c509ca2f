"""Benchmarks: speed and memory of attention and of whole models, each a command of `longshort bench`."""

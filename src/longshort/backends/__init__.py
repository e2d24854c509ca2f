"""One module per way to compute attention over a head layout; they share `call` and nothing else."""

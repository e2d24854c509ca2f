"""The study `progress` (figures 1, 3, 4 and 5): MHSA and LS-attention at equal progress, in long runs."""

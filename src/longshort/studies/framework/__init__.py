"""The framework of all studies: their interface, sweeps, comparisons, the runner, its files and page."""

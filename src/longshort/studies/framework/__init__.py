"""The framework of all studies: what a study is, sweeps, comparisons, the runner, its files and page."""

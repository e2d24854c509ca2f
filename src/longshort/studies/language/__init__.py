"""Studies that train language models: arms, trials, and measures of their results."""

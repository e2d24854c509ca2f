"""Studies that train language models: arms, trials, and what their results say."""

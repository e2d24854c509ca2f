"""Training: what to train (`config`), the folder of a run (`run`), the loop (`loop`) and its parts."""

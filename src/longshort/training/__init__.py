"""Training: the settings (`config`), the folder of a run (`run`), the loop (`loop`) and its parts."""

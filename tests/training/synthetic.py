"""Runs as the training loop leaves them, without training: a metrics.jsonl of made-up numbers."""

import json
import math


def metric_lines(steps=60, layers=2, heads=4, mhsa=False, monitored=True, diverges_at=None):
    lines = []
    for step in range(1, steps + 1):
        loss = 1.5 + 4 * math.exp(-step / 10) + 0.05 * math.sin(step)
        line = {"step": step, "tokens": step * 4096, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0}
        line["tokens_per_second"] = 40_000.0 + step
        if diverges_at is not None and step >= diverges_at:
            line["loss"] = None
        if monitored and step % 10 == 0:
            logits = [
                [step**0.5 * (1 + head) * (1 + layer) for head in range(heads)] for layer in range(layers)
            ]
            line |= {"max_logit": max(map(max, logits)), "max_logit_global": max(row[-1] for row in logits)}
            line["max_logit_global_in_band"] = 0.5 * line["max_logit_global"]
            if not mhsa and heads > 1:
                line["max_logit_local"] = max(max(row[:-1]) for row in logits)
            line["max_logit_by_head"] = logits
            line["entropy_by_head"] = [[3 - step / 100 + head / 10 for head in range(heads)]] * layers
        if step % 30 == 0:
            line["validation_loss"] = loss + 0.1
        lines.append(line)
    return lines


def write_run(folder, lines=None, **shape):
    folder.mkdir(parents=True)
    content = metric_lines(**shape) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    return folder

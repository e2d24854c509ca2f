import re

import pytest
from tests.terminals import in_kernel, on_terminal

from longshort.training import display

TRAINING = """
import time
from types import SimpleNamespace
from longshort.training import display
display.describe_model = lambda run: "a model of 5 parameters"
with display.TrainingDisplay() as shown:
    shown.on_start(SimpleNamespace(training=SimpleNamespace(steps=8)), 0)
    for step in range(1, 9):
        shown.on_step(step, {"loss": 1.5, "max_logit": 9.9, "tokens_per_second": 1e5, "validation_loss": 2.5})
        time.sleep(0.1)
    shown.on_message("all is done")
"""
PLAIN = "loss 1.5000  validation 2.5000  largest logit 9.9  100,000 tokens/s"


@pytest.mark.parametrize("columns", [pytest.param(110, marks=pytest.mark.slow), 40])
def test_a_terminal_shows_steps_and_time_left_at_any_width(columns):
    written = on_terminal(TRAINING, columns)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    frames = [frame.rstrip() for frame in re.split(r"[\r\n]+", plain) if frame.strip()]
    assert all(len(frame) <= columns for frame in frames)
    assert {"a model of 5 parameters", "all is done"} <= set(frames)
    assert re.search(r"8/8 loss 1\.5000 .*\d:\d\d:\d\d$", frames[-1])
    assert (PLAIN in frames[-1]) == (columns == 110)


def test_a_dumb_terminal_shows_lines():
    lines = on_terminal(TRAINING, TERM="dumb").splitlines()
    assert lines[0] == "a model of 5 parameters"
    assert lines[1].startswith(f"step 1/8  {PLAIN}")
    assert lines[-2] == f"step 8/8  {PLAIN}  0 s left"


def test_a_notebook_shows_one_line_that_is_replaced():
    (outputs,) = in_kernel(TRAINING)
    texts = [output.text for output in outputs if output.get("name") == "stdout"]
    lines = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert "".join(texts) == "a model of 5 parameters\nall is done\n"
    assert lines == [f"step 8/8  {PLAIN}  0 s left"]
    assert all(set(output.data) == {"text/plain"} for output in outputs if "data" in output)


def test_a_loss_that_is_not_finite_is_named():
    assert display.describe_progress({"loss": None, "max_logit": float("inf")}) == (
        "loss not finite  largest logit not finite"
    )

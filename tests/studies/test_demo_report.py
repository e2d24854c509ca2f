from dataclasses import replace

import pytest
from tests.training.synthetic import write_run

from longshort.evaluation import Evaluation, PositionLoss
from longshort.studies.demo import DemoSettings, ModelResult
from longshort.studies.demo_report import describe_outcome, result_table, write_demo_report


def result(loss=1.5, **changes):
    bins = [PositionLoss(0, 0, 4.0, 1), PositionLoss(1, 15, loss, 9)]
    return replace(
        ModelResult(
            parameters=164_288,
            evaluation=Evaluation(loss, 4.48, 2.16, 10, 9, 1, 16, bins),
            max_logit=16.0,
            max_logit_in_band=12.0,
            logit_growth=1.0,
            first_not_finite=None,
            tokens_per_second=30_000.0,
            training_seconds=400.0,
            sample="<b>text</b>",
        ),
        **changes,
    )


def words(tmp_path, local, full):
    settings = DemoSettings(tmp_path / "out", steps=1000, tokens_per_step=4096, sequence_length=1024)
    return describe_outcome(settings, {"LS-attention": local, "MHSA": full})


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (1.5, 1.8, "LS-attention is better by 0.300 (16.7%): LS-attention 1.500, MHSA 1.800"),
        (1.8, 1.5, "MHSA is better by 0.300 (16.7%): LS-attention 1.800, MHSA 1.500"),
        (1.5, 1.502, "the two are alike: LS-attention 1.500, MHSA 1.502"),
    ],
)
def test_whoever_has_the_lower_loss_is_named(tmp_path, ours, theirs, verdict):
    loss = words(tmp_path, result(ours), result(theirs))[0]
    assert loss.startswith("Loss: after 4.1 million bytes")
    assert verdict in loss


def test_divergence_is_said_first(tmp_path):
    loss = words(tmp_path, result(), result(first_not_finite=120))[0]
    assert loss == "Loss: the loss of MHSA was not finite from step 120 on."


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        (64.0, "4.0 times smaller with LS-attention"),
        (4.0, "4.0 times larger with LS-attention"),
        (16.5, "about the same"),
    ],
)
def test_the_logits_are_compared(tmp_path, theirs, verdict):
    text = words(tmp_path, result(), result(max_logit=theirs))[1]
    assert f"MHSA's largest attention logit is {theirs:.0f}, LS-attention's 16" in text
    assert verdict in text


@pytest.mark.parametrize(
    ("growth", "phrase"),
    [(1.4, "grew by 40%"), (0.8, "fell by 20%"), (1.01, "stayed where it was"), (None, "was not measured")],
)
def test_their_growth_is_told(tmp_path, growth, phrase):
    text = words(tmp_path, result(), result(logit_growth=growth))[1]
    assert f"LS-attention's stayed where it was; MHSA's {phrase}." in text


def test_equal_pairs_are_compared(tmp_path):
    text = words(tmp_path, result(), result(max_logit_in_band=48.0))[1]
    assert text.endswith("it is 48 against 12.")
    assert "pairs" not in words(tmp_path, result(max_logit_in_band=None), result())[1]


def test_logits_that_are_not_finite_are_said(tmp_path):
    assert "not finite" in words(tmp_path, result(), result(max_logit=None))[1]


@pytest.mark.parametrize(
    ("speed", "verdict"),
    [
        (15_000.0, "LS-attention trained 2.00 times as fast"),
        (60_000.0, "MHSA trained 2.00 times as fast"),
        (30_100.0, "both trained at the same speed"),
    ],
)
def test_the_speeds_are_compared(tmp_path, speed, verdict):
    assert verdict in words(tmp_path, result(), result(tokens_per_second=speed))[2]


def test_the_table_has_a_column_per_model():
    table = result_table({"LS-attention": result(), "MHSA": result(1.8, max_logit=None)})
    assert list(table.header) == ["", "LS-attention", "MHSA"]
    rows = {name: cells for name, *cells in table.rows}
    assert rows["parameters"] == ["164,288", "164,288"]
    assert rows["validation loss (nats per byte)"] == ["1.5", "1.8"]
    assert rows["largest logit"] == ["16", "not finite"]
    assert rows["tokens per second"] == ["30,000", "30,000"]
    assert len(rows) == 8


def test_the_page_has_pictures_and_samples_as_they_are(tmp_path):
    settings = DemoSettings(tmp_path)
    write_run(tmp_path / "ls")
    write_run(tmp_path / "mhsa", mhsa=True)
    file = write_demo_report(settings, {"LS-attention": result(), "MHSA": result(1.8, sample="")})
    page = file.read_text()
    assert file == tmp_path / "report.html"
    assert page.count("data:image/png;base64,") == 4
    assert "&lt;b&gt;text&lt;/b&gt;" in page
    assert "<b>text</b>" not in page

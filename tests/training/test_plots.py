import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.image import imread
from tests.training.synthetic import metric_lines, write_run

from longshort.evaluation import Evaluation, PositionLoss
from longshort.training import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by the stem of their file."""
    figures = {}
    save = plots.save_figure

    def keep(figure, file):
        figures[file.stem] = figure
        save(figure, file)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def lines_of(axes):
    """The drawn lines by label, the helpers of the legend left out."""
    return {line.get_label(): line for line in axes.get_lines() if len(line.get_xdata())}


def test_a_run_gets_four_pictures(tmp_path):
    run = write_run(tmp_path / "run")
    files = plots.plot_run(run)
    assert [file.relative_to(run).as_posix() for file in files] == [
        "plots/loss.png", "plots/logits.png", "plots/entropy.png", "plots/heads.png"
    ]  # fmt: skip
    for file in files:
        picture = imread(file)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02
    assert sorted(file.name for file in (run / "plots").iterdir()) == sorted(file.name for file in files)


def test_the_loss_shows_training_and_validation(tmp_path, drawn):
    plots.plot_run(write_run(tmp_path / "run"))
    axes = drawn["loss"].axes[0]
    metrics = metric_lines()
    raw, mean, validation = (line for line in axes.get_lines() if len(line.get_xdata()))
    assert raw.get_ydata().tolist() == [line["loss"] for line in metrics]
    assert len(mean.get_ydata()) == len(metrics)
    assert validation.get_xdata().tolist() == [30, 60]
    assert validation.get_ydata().tolist() == [metrics[29]["validation_loss"], metrics[59]["validation_loss"]]
    assert "nats" in axes.get_ylabel()
    assert axes.get_xlabel() == "step"


def test_the_logits_show_each_group(tmp_path, drawn):
    plots.plot_run(write_run(tmp_path / "run"))
    axes = drawn["logits"].axes[0]
    assert axes.get_yscale() == "log"
    by_label = lines_of(axes)
    assert set(by_label) == {"global heads", "global heads, inside the local window", "local heads"}
    metrics = metric_lines()[9::10]
    assert by_label["local heads"].get_ydata().tolist() == [line["max_logit_local"] for line in metrics]
    assert by_label["global heads"].get_xdata().tolist() == [10, 20, 30, 40, 50, 60]


def test_groups_that_a_model_lacks_are_left_out(tmp_path, drawn):
    plots.plot_run(write_run(tmp_path / "run", mhsa=True))
    assert set(lines_of(drawn["logits"].axes[0])) == {"global heads", "global heads, inside the local window"}


def test_the_heads_show_the_last_monitored_step(tmp_path, drawn):
    plots.plot_run(write_run(tmp_path / "run", steps=65))
    axes = drawn["heads"].axes[0]
    (image,) = axes.get_images()
    assert image.get_array().tolist() == metric_lines()[59]["max_logit_by_head"]
    assert isinstance(image.norm, LogNorm)
    assert "step 60" in axes.get_title()
    assert len(axes.texts) == 8


def test_the_entropy_shows_every_head_over_all_steps(tmp_path, drawn):
    plots.plot_run(write_run(tmp_path / "run"))
    (mesh,) = drawn["entropy"].axes[0].collections
    expected = np.array([line["entropy_by_head"] for line in metric_lines()[9::10]])
    assert np.allclose(mesh.get_array().reshape(8, 6), expected.reshape(6, 8).T)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (36, 20)])
def test_models_of_any_size(tmp_path, layers, heads):
    assert len(plots.plot_run(write_run(tmp_path / "run", layers=layers, heads=heads))) == 4


@pytest.mark.parametrize("steps", [1, 10, 400])
def test_runs_of_any_length(tmp_path, steps):
    files = plots.plot_run(write_run(tmp_path / "run", steps=steps))
    assert [file.stem for file in files] == ["loss", "logits", "entropy", "heads"][: 4 if steps >= 10 else 1]


def test_a_run_without_monitoring_has_its_loss(tmp_path):
    files = plots.plot_run(write_run(tmp_path / "run", monitored=False))
    assert [file.stem for file in files] == ["loss"]


def test_divergence_is_marked(tmp_path, drawn):
    plots.plot_run(write_run(tmp_path / "run", diverges_at=41))
    axes = drawn["loss"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["not finite from step 41"]
    raw = axes.get_lines()[0].get_ydata()
    assert np.isfinite(raw[:40]).all()
    assert np.isnan(raw[40:]).all()


def test_logits_that_are_not_finite_leave_a_gap(tmp_path):
    lines = metric_lines()
    for line in lines[39:]:
        if "max_logit" in line:
            line |= {"max_logit": None, "max_logit_global": None, "max_logit_local": None}
            line["max_logit_by_head"] = [[None] * 4, [1.0, None, 2.0, 3.0]]
            line["entropy_by_head"] = [[None] * 4] * 2
    assert len(plots.plot_run(write_run(tmp_path / "run", lines))) == 4


def test_logits_of_zero_do_not_break_the_log_scale(tmp_path):
    lines = metric_lines()
    for line in lines:
        if "max_logit" in line:
            line |= {"max_logit": 0.0, "max_logit_global": 0.0, "max_logit_global_in_band": 0.0}
            line |= {"max_logit_local": 0.0, "max_logit_by_head": [[0.0] * 4] * 2}
    assert len(plots.plot_run(write_run(tmp_path / "run", lines))) == 4


def test_pictures_are_replaced(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "plots").mkdir()
    (run / "plots" / "loss.png").write_bytes(b"old")
    (run / "plots" / "mine.txt").write_text("kept")
    plots.plot_run(run)
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "plots" / "mine.txt").read_text() == "kept"


def test_comparing_draws_all_runs_in_one_picture(tmp_path, drawn):
    runs = {
        "LS": write_run(tmp_path / "ls"),
        "MHSA": write_run(tmp_path / "mhsa", mhsa=True, steps=50),
    }
    files = plots.compare_runs(runs, tmp_path / "out")
    assert [file.name for file in files] == ["loss.png", "logits.png", "heads.png"]
    assert {"LS", "MHSA"} <= set(lines_of(drawn["loss"].axes[0]))
    logits = lines_of(drawn["logits"].axes[0])
    assert {"LS", "MHSA"} <= set(logits)
    assert (
        logits["LS"].get_color()
        == lines_of(drawn["loss"].axes[0])["LS"].get_color()
        != logits["MHSA"].get_color()
    )
    dashed = [line for line in drawn["logits"].axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [len(line.get_xdata()) for line in dashed] == [6, 5, 0]
    panels = [axes for axes in drawn["heads"].axes if axes.get_images()]
    assert [axes.get_title() for axes in panels] == ["LS, step 60", "MHSA, step 50"]
    assert len({axes.get_images()[0].get_clim() for axes in panels}) == 1


def test_runs_with_different_statistics_compare_what_they_share(tmp_path):
    runs = {"a": write_run(tmp_path / "a"), "b": write_run(tmp_path / "b", monitored=False)}
    assert [file.name for file in plots.compare_runs(runs, tmp_path / "out")] == ["loss.png"]


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        plots.plot_run(tmp_path)
    with pytest.raises(ValueError, match="no line yet"):
        plots.plot_run(write_run(tmp_path / "empty", []))
    with pytest.raises(ValueError, match="at least one run"):
        plots.compare_runs({}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "empty" / "plots").exists()


def test_loss_by_position(tmp_path, drawn):
    bins = [PositionLoss(0, 0, 4.0, 10), PositionLoss(1, 2, 3.0, 20), PositionLoss(3, 6, 2.0, 40)]
    evaluation = Evaluation(2.6, 13.5, 3.7, 70, 70, 3, 7, bins)
    file = plots.plot_loss_by_position({"run": evaluation}, tmp_path / "new" / "position.png")
    assert imread(file).shape[1] > 400
    line = lines_of(drawn["position"].axes[0])["run"]
    assert line.get_xdata().tolist() == [1, 2.5, 5.5]
    assert line.get_ydata().tolist() == [4, 3, 2]
    with pytest.raises(ValueError, match="at least one evaluation"):
        plots.plot_loss_by_position({}, tmp_path / "none.png")

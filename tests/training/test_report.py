import re
from html.parser import HTMLParser

import pytest
from tests.training.synthetic import metric_lines, write_run

from longshort.reporting.page import (
    Figure,
    Report,
    Sample,
    Section,
    Table,
    number,
    render_report,
)
from longshort.training.report import summarize, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(HTMLParser):
    """Collects what a page refers to, and fails on tags that do not close."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    return checker


def test_a_runs_report_is_one_file_with_all_its_pictures(tmp_path):
    run = write_run(tmp_path / "my run")
    file = write_report(run)
    assert file == run / "report.html"
    html = file.read_text()
    page = check(html)
    assert len(page.references) == 4
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    assert "my run" in page.text
    assert "60 steps" in page.text
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "plots", "report.html"]


def test_a_report_is_made_anew(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    assert "old" not in write_report(run).read_text()[:200]


def test_a_report_needs_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no line yet"):
        write_report(write_run(tmp_path / "empty", []))
    assert not (tmp_path / "report.html").exists()


def test_text_is_shown_as_it_is(tmp_path):
    nasty = "<script>alert('x')</script> & \"quotes\""
    report = Report(
        title=nasty,
        subtitle=nasty,
        sections=[
            Section(
                nasty, [nasty], Table((nasty, "b"), [(nasty, nasty)]), samples=[Sample(nasty, nasty, nasty)]
            )
        ],
    )
    html = render_report(report)
    assert "<script>" not in html
    assert check(html).text.count("<script>alert('x')</script>") == 11


def test_figures_say_what_they_show(tmp_path):
    run = write_run(tmp_path / "run")
    write_report(run)
    figure = Figure(run / "plots" / "loss.png", "a caption")
    html = render_report(Report("t", "s", [Section(figures=[figure])]))
    assert 'alt="a caption"' in html
    assert 'width="750"' in html


def test_a_figure_must_be_a_png(tmp_path):
    (tmp_path / "text.png").write_text("not a picture, but long enough for its header")
    with pytest.raises(ValueError, match=r"text\.png is not a PNG"):
        render_report(Report("t", "s", [Section(figures=[Figure(tmp_path / "text.png", "c")])]))


def test_the_summary_reads_the_end_and_the_best():
    lines = metric_lines()
    lines[29]["validation_loss"] = 1.25
    rows = {name: (value, step) for name, value, step in summarize(lines)}
    assert rows["training loss (nats per token)"] == (f"{lines[-1]['loss']:.4g}", "60")
    assert rows["best validation loss (nats per token)"] == ("1.25", "30")
    assert rows["largest logit"] == (f"{lines[-1]['max_logit']:.4g}", "60")
    assert rows["tokens per second (median)"] == ("40,030", "")


def test_the_summary_of_a_diverged_run_says_so():
    rows = {name: value for name, value, _ in summarize(metric_lines(diverges_at=50))}
    assert rows["training loss (nats per token)"] == "not finite"


def test_the_summary_leaves_out_what_was_not_measured():
    names = [name for name, _, _ in summarize(metric_lines(steps=5))]
    assert names == ["training loss (nats per token)", "tokens per second (median)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23456, "1.235"), (12345.6, "12,346"), (None, "not finite"), (float("nan"), "not finite")],
)
def test_numbers(value, text):
    assert number(value) == text

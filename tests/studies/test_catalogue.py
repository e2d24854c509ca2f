from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from tests.studies.in_process import run_here

from longshort.reporting.page import Report, render_report
from longshort.studies import catalogue
from longshort.studies.catalogue import STUDIES, StudySettings, judge_all, run_studies
from longshort.studies.framework.store import RESULTS_FILE, ResultsFile


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"text {number} says {number * 7} and ends\n" * 60)
    return folder


@pytest.fixture(scope="module")
def all_studies(texts, tmp_path_factory):
    settings = StudySettings(
        "all", scale="smoke", source=str(texts), out=tmp_path_factory.mktemp("lab") / "out"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "run_trials", run_here)
        return settings, run_studies(settings)


def test_every_study_runs_and_judges_its_claims(all_studies):
    settings, report = all_studies
    assert list(report.verdicts) == list(STUDIES)
    for name, verdicts in report.verdicts.items():
        assert [verdict.claim for verdict in verdicts] == list(STUDIES[name].claims)
        assert all(verdict.evidence for verdict in verdicts)
        written = json.loads((settings.folder / name / "findings.json").read_text())
        outcomes = [verdict["outcome"] for verdict in written["verdicts"]]
        assert outcomes == [verdict.outcome.value for verdict in verdicts]
        assert written["prediction_intervals"] or name == "latency"


def test_the_report_sets_claims_beside_measurements(all_studies):
    _, report = all_studies
    page = report.file.read_text()
    for name, verdicts in report.verdicts.items():
        assert STUDIES[name].title in page
        for verdict in verdicts:
            assert verdict.outcome.value in page
    assert page.count("data:image/png;base64,") >= 8
    assert not re.search(r'(src|href)="(?!data:)', page)  # needs nothing beside it


@pytest.mark.parametrize("name", STUDIES)
def test_an_interrupted_study_is_reported_as_far_as_it_came(all_studies, tmp_path, name):
    """With nothing, with half, and without the first arm: every claim has a verdict, every section a page."""
    settings, _ = all_studies
    lines = (settings.folder / name / RESULTS_FILE).read_text().splitlines()
    arms = {record["key"]: record["arm"] for record in map(json.loads, lines)}
    whole, draw = ResultsFile(settings.folder / name).results, random.Random(name)
    first = next(iter(arms.values()))
    for keep in (lambda _: False, lambda _: draw.random() < 0.5, lambda key: arms[key] != first):
        results = {key: result for key, result in whole.items() if keep(key)}
        found = STUDIES[name].findings("smoke", range(2), results, tmp_path)
        assert [verdict.claim for verdict in found.verdicts] == list(STUDIES[name].claims)
        assert render_report(Report(name, "", found.sections))


def test_the_same_command_again_changes_nothing(all_studies, monkeypatch):
    """Only the report is written again; it is left out here."""
    settings, report = all_studies
    monkeypatch.setattr(catalogue, "judge_all", lambda *_: {})
    monkeypatch.setattr(catalogue, "write_study_report", lambda *_: report.file)
    files = sorted(settings.folder.glob(f"*/{RESULTS_FILE}"))
    before = [file.read_bytes() for file in files]
    assert len(before) == len(STUDIES)
    run_studies(settings)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("name", ["progress", "allocation"])
def test_lost_results_come_again_to_the_byte(all_studies, texts, tmp_path, monkeypatch, name):
    """Trainings, and measurements of weights that are still there or not."""
    settings, _ = all_studies
    out, draw = tmp_path / "out", random.Random(name)
    shutil.copytree(settings.folder, out, ignore=shutil.ignore_patterns(*STUDIES.keys() - {name}))
    file = out / name / RESULTS_FILE
    whole = file.read_bytes()
    file.write_bytes(b"".join(line for line in whole.splitlines(keepends=True) if draw.random() < 0.7))
    assert file.read_bytes() != whole
    for folder in sorted(path for path in (out / "runs").iterdir() if path.is_dir()):
        if draw.random() < 0.3:
            shutil.rmtree(folder)
    monkeypatch.setattr(catalogue, "run_trials", run_here)
    run_studies(StudySettings(name, scale="smoke", source=str(texts), out=out))
    assert file.read_bytes() == whole


def test_another_scale_or_corpus_is_refused(all_studies, texts):
    settings, _ = all_studies
    with pytest.raises(ValueError, match=r"--out: .* holds results of .*smoke"):
        run_studies(StudySettings("latency", scale="laptop", source=str(texts), out=settings.folder))
    with pytest.raises(ValueError, match=r"--out: .* holds results of"):
        run_studies(StudySettings("latency", scale="smoke", source="stdlib", out=settings.folder))


def test_other_seeds_are_refused_before_anything_is_touched(texts, tmp_path, monkeypatch):
    """More of the same seeds, or fewer, are welcome: verdicts on them replace those on the same runs."""
    monkeypatch.setattr(catalogue, "run_trials", lambda *_: True)

    def run(first, count, name="explosion"):
        run_studies(
            StudySettings(name, scale="smoke", source=str(texts), out=tmp_path, first_seed=first, seeds=count)
        )

    def content():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    run(1, 2)
    before = content()
    for first, count, name in ((3, 2, "explosion"), (2, 1, "explosion"), (0, 4, "explosion"), (0, 2, "all")):
        with pytest.raises(ValueError, match=r"--first-seed: .* explosion from the seed 1 on, got .* --out"):
            run(first, count, name)
    assert content() == before
    run(5, 1, "length")
    for count in (4, 1, 2):
        run(1, count)


def test_results_at_a_scale_that_a_study_no_longer_has_are_left_alone(tmp_path):
    (tmp_path / "length").mkdir()
    (tmp_path / "length" / RESULTS_FILE).touch()
    (tmp_path / "study.json").write_text('{"seeds": {"length": [0]}}')
    assert judge_all("laptop", tmp_path) == {}


def test_a_folder_with_other_things_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no study"):
        run_studies(StudySettings("latency", scale="smoke", out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_corpus_is_an_error_before_anything_is_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        run_studies(
            StudySettings("latency", scale="smoke", out=tmp_path / "out", source=str(tmp_path / "no"))
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "explosions"}, "NAME must be one of dense-local, .* or all, got 'explosions'"),
        ({"scale": "desktop"}, "--scale must be one of smoke, laptop, overnight, gpu, paper, got 'desktop'"),
        ({"seeds": 0}, "--seeds must be an integer >= 1, got 0"),
        ({"minutes": 0}, "--minutes must be a number > 0, got 0"),
        (
            {"name": "length", "scale": "gpu"},
            "--scale must be one of smoke, overnight, paper for length, got 'gpu', a scale of progress",
        ),
        (
            {"name": "explosion"},
            "--scale must be one of smoke, .* for explosion, got 'laptop', a scale of dense-local, progress",
        ),
        ({"jobs": True}, "--jobs must be an integer >= 1, got True"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        StudySettings(**{"name": "all", **change})


def test_all_takes_the_studies_that_have_the_scale():
    assert [study.name for study in StudySettings("all", scale="gpu").studies] == ["progress"]
    assert [study.name for study in StudySettings("all", scale="laptop").studies] == [
        "dense-local", "progress", "allocation", "design", "latency"
    ]  # fmt: skip
    for scale in ("smoke", "overnight"):
        assert [study.name for study in StudySettings("all", scale=scale).studies] == list(STUDIES)
    at_paper = [study.name for study in StudySettings("all", scale="paper").studies]
    assert at_paper == [name for name in STUDIES if name != "allocation"]  # 2³⁶ layouts are too many


def test_every_claim_belongs_to_one_study():
    counts = Counter(claim.id for study in STUDIES.values() for claim in study.claims)
    assert set(counts.values()) == {1}, counts
    controls = [name for name, study in STUDIES.items() if not study.claims]
    assert controls == ["explosion", "length", "remedies"]


@pytest.mark.parametrize(
    ("study", "scale"),
    [
        pytest.param(study, scale, id=f"{name}-{scale}")
        for name, study in STUDIES.items()
        for scale in study.scales
    ],
)
def test_every_study_has_a_plan_at_each_of_its_scales(study, scale):
    seeds = range(study.default_seeds(scale))
    trials = study.plan(scale, seeds, {}).trials
    assert trials
    assert len({trial.key for trial in trials}) == len(trials)
    assert all(trial.work > 0 for trial in trials)
    assert all(json.loads(json.dumps(trial.settings)) == trial.settings for trial in trials)


@pytest.mark.slow
def test_an_interrupted_study_comes_to_the_same_results(all_studies, texts, tmp_path):
    """Ctrl-C to the whole group, as a terminal sends it, while trainings are at work; twice."""
    settings, _ = all_studies
    out = tmp_path / "out"
    command = [sys.executable, "-m", "longshort", "study", "explosion", "--scale", "smoke"]
    command += ["--source", str(texts), "--out", str(out)]
    for runs in (1, 8):
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while len(list(out.glob("runs/*/metrics.jsonl"))) < runs:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in output
        assert b"the same command resumes" in output
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ours = (out / "explosion" / RESULTS_FILE).read_bytes()
    assert ours == (settings.folder / "explosion" / RESULTS_FILE).read_bytes()

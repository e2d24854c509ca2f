"""The paper's runs: their models, that their commands parse, and that they fit the GPUs that they name."""

import itertools
import json
import math
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.training.runs import start_program, torchrun

from longshort.cli.train import parse_settings
from longshort.model import LongShortForCausalLM, parameter_count
from longshort.model.scaling import training_memory
from longshort.training.config import TrainConfig
from longshort.training.metrics import read_metrics
from longshort.training.paper_runs import GPU_MEMORY, PaperRun, paper_runs

RUNS = paper_runs()


def test_every_length_of_the_paper_is_there_with_both_kinds_of_attention() -> None:
    assert len({run.name for run in RUNS}) == len(RUNS)
    lengths = {"paper-small": [2048], "paper-base": [512, 1024, 2048, 4096, 8192], "paper-large": [8192]}
    for preset, found in lengths.items():
        for length, mhsa in itertools.product(found, (False, True)):
            assert any((run.preset, run.length, run.mhsa) == (preset, length, mhsa) for run in RUNS)
    assert {run.preset for run in RUNS} == lengths.keys()
    assert {run.length * run.batch for run in RUNS} == {524_288}
    small = next(run for run in RUNS if run.preset == "paper-small")
    assert small.batch == 256  # the author's


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_model_is_built_without_memory(run: PaperRun) -> None:
    config = run.config()
    with torch.device("meta"):
        model = LongShortForCausalLM(config)
    width, layers = config.hidden_size, config.num_hidden_layers
    tables = (2 * config.vocab_size + run.length) * width
    norms = layers * 2 * config.head_dim if config.qk_norm else 0
    assert model.num_parameters() == tables + layers * (12 * width**2 + 2 * width) + width + norms
    windows = {window for layout in config.head_layouts() for window in layout.windows}
    assert windows == ({None} if run.mhsa else {50 if run.preset == "paper-small" else 100, None})


def test_attention_of_both_kinds_has_equally_many_parameters() -> None:
    for preset, length in {(run.preset, run.length) for run in RUNS}:
        alike = [run for run in RUNS if (run.preset, run.length) == (preset, length)]
        counts = {parameter_count(run.config()) for run in alike if "qk_norm" not in run.model}
        assert len(counts) == 1


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_command_is_one_that_train_takes(run: PaperRun) -> None:
    words = shlex.split(run.command().replace("$HOST", "host"))
    launcher, arguments = words[: words.index("train") + 1], words[words.index("train") + 1 :]
    assert launcher[0] == "torchrun" and launcher[-3:] == ["-m", "longshort", "train"]
    nodes = int(launcher[launcher.index("--nnodes") + 1]) if "--nnodes" in launcher else 1
    assert nodes * int(launcher[launcher.index("--nproc-per-node") + 1]) == run.ranks
    settings = parse_settings(arguments)
    assert settings == TrainConfig(
        preset=run.preset, data=Path("data/pg19"), out=Path(f"runs/{run.name}"), **run.settings
    )
    config = run.config()
    assert settings.model_overrides().items() <= config.to_dict().items()
    assert (settings.batch_size, settings.sequence_length) == (run.batch, run.length)
    assert settings.schedule_or_defaults() == (2000, 600_000, pytest.approx(6e-5))  # the author's


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_plan_fits_the_gpus(run: PaperRun) -> None:
    """With a tenth to spare for what is not counted."""
    assert training_memory(run.setup()).total < 0.9 * GPU_MEMORY


STEP_MEMORY, STEP_SECONDS = 24 * 2**30, 1800
STEP_OVERHEAD = 2**29  # bytes that a process takes besides tensors
STEP_LENGTHS = {"large-8192-ls": 4096, "large-8192-ls-4": 4096, "large-8192-mhsa": 2048}
"""Sequence lengths of the runs that do not fit at the paper's."""


ONE_STEP = """
import json, sys
from longshort.training.config import TrainConfig
from longshort.training.loop import train
from longshort.training.progress import Progress

class Stop(Progress):
    def on_step(self, step, record):
        raise RuntimeError(f"stopped after step {step}")

train(TrainConfig(**json.loads(sys.argv[1])), Stop())
"""


def step_settings(run: PaperRun, data: Path, out: Path) -> TrainConfig:
    """One step of a run on 2 × 2 processes of a CPU: two sequences, fp32, gradient checkpointing."""
    smaller = {
        "sequence_length": STEP_LENGTHS.get(run.name, run.length), "batch_size": 2, "micro_batch_size": None,
        "steps": 1, "warmup_steps": 0, "schedule_steps": None, "precision": "fp32", "parallel": "fsdp",
        "context_parallel": 2, "gradient_checkpointing": True, "evaluate_every": 0, "monitor_every": 0,
        "tensorboard": False, "log_every": 1, "threads": 1, "device": "cpu", "timeout": float(STEP_SECONDS),
    }  # fmt: skip
    return TrainConfig(**{"preset": run.preset, "data": data, "out": out, **run.settings, **smaller})


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_its_step_on_a_cpu_fits_24_gib(run: PaperRun) -> None:
    run = replace(run, length=STEP_LENGTHS.get(run.name, run.length))
    setup = replace(
        run.setup(), ranks=4, context_parallel=2, batch=2, micro_batch=None, precision="fp32",
        checkpointing=True,
    )  # fmt: skip
    assert 4 * (training_memory(setup).total + STEP_OVERHEAD) < 0.9 * STEP_MEMORY


@pytest.mark.slow
@pytest.mark.timeout(STEP_SECONDS + 100)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_it_steps_with_shards_and_sequences_in_two(
    run: PaperRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model, but for its vocabulary, which is that of bytes. No checkpoint is saved: the copies of
    weights and optimizer would not fit."""
    # glibc then gives the memory of tensors back, instead of keeping a quarter more than is in use
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    settings = step_settings(run, data, tmp_path / "run")
    arguments = json.dumps(vars(settings), default=str)
    process = start_program(ONE_STEP, arguments, launcher=torchrun(4))
    try:
        output, _ = process.communicate(timeout=STEP_SECONDS)
        assert process.returncode == 1 and "RuntimeError: stopped after step 1" in output, output
        (record,) = read_metrics(settings.out)
        assert record["loss"] == pytest.approx(math.log(257), abs=0.5)
        assert 0 < record["grad_norm"] < math.inf
        assert not list(settings.out.glob("checkpoints/*"))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        raise
    finally:
        process.wait(60)

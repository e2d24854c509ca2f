"""`longshort plan --ranks` and `--paper-runs`: what they print, and what they refuse."""

import json

import pytest

from longshort.cli import main
from longshort.model import preset
from longshort.model.scaling import Rates, TrainingSetup, compare_training
from longshort.training.paper_runs import paper_runs

CUT = ["--ranks", "8", "--context-parallel", "4", "--length", "512", "--batch", "4", "--preset", "tiny"]


def planned(capsys, *flags):
    capsys.readouterr()
    assert main(["plan", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_tables_of_one_number_of_gpus(capsys):
    out = planned(capsys, *CUT)
    assert out.startswith("2 layers, 4 heads of 16, hidden size 64: ")
    assert "\n4 sequences of 512 tokens a step; bf16, FSDP over all\n" in out
    assert "\n2 × 4 GPUs, those of a row share sequences: 1 × 2 of them a step\n" in out
    for title in ("memory of a GPU", "FLOPs of a step", "sent a layer, forward", "sent by a GPU, a step",
                  "time of a step (model)"):  # fmt: skip
        (line,) = [line for line in out.splitlines() if line.startswith(f" {title} ")]
        assert line.endswith("  LS-attention  MHSA, all-gather  MHSA, ring ")
    assert "Times are a model, not measured. Assumed: 989.4 TFLOP/s a GPU" in out
    assert max(map(len, out.splitlines())) <= 80


def test_one_line_for_each_number_of_gpus(capsys):
    out = planned(capsys, "--ranks", "4", "16", "1024", "--length", "512", "--batch", "4", "--preset", "tiny")
    rows = [line.split() for line in out.splitlines() if " × " in line]
    assert [row[2] for row in rows] == ["1"] * 2 + ["4"] * 3 + ["256"] * 3
    assert [row[0] for row in rows] == ["4"] * 8
    names = [" ".join(row[-2:]) for row in rows[2:5]]
    assert names[0].endswith(" LS") and names[1:] == ["MHSA, gather", "MHSA, ring"]
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_the_numbers_of_the_model(capsys):
    content = json.loads(planned(capsys, *CUT, "--json", "--overlap", "0", "--gpus-per-node", "2"))
    rates = Rates(overlap=0, gpus_per_node=2)
    assert content["rates"] == vars(rates)
    setup = TrainingSetup(preset("tiny"), 512, 4, 8, context_parallel=4)
    for row, plan in zip(content["plans"], compare_training(setup, rates), strict=True):
        assert row["name"] == plan.name and row["exchange"] == plan.setup.exchange
        assert (row["data_ranks"], row["context_parallel"], row["micro_batch"]) == (2, 4, 2)
        assert row["memory_bytes"]["total"] == plan.memory.total == sum(vars(plan.memory).values())
        assert row["memory_bytes_checkpointed"]["activations"] == plan.checkpointed.activations
        assert row["flops"]["total"] == plan.flops.total
        assert row["layer_bytes_sent"]["halo"] == plan.layer.halo
        assert row["step_bytes_sent"]["total"] == pytest.approx(plan.traffic.total)
        assert row["step_seconds"]["total"] == plan.time.total


def test_flags_reach_the_model_and_the_setup(capsys, tmp_path):
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({"layouts": [[3, 3, 3, None], [5, 5, None, None]]}))
    (ours, mhsa) = json.loads(planned(
        capsys, "--ranks", "2", "--length", "64", "--batch", "4", "--preset", str(file), "--json",
        "--parallel", "ddp", "--precision", "fp32", "--gradient-checkpointing", "--micro-batch-size", "1",
    ))["plans"]  # fmt: skip
    assert (ours["parallel"], ours["shards"], ours["precision"], ours["micro_batch"]) == ("ddp", 1, "fp32", 1)
    assert ours["gradient_checkpointing"] and ours["memory_bytes"] == ours["memory_bytes_checkpointed"]
    assert ours["flops"]["local_attention"] > 0 == mhsa["flops"]["local_attention"]
    flags = ["--heads", "8", "--kv-heads", "4", "--head-dim", "8", "--layers", "3", "--global-heads", "2"]
    flags += ["--window", "7", "--sink-tokens", "2", "--position-embedding", "rope", "--vocab-size", "99"]
    content = json.loads(planned(capsys, *CUT, *flags, "--json"))
    config = preset(
        "tiny", num_attention_heads=8, num_key_value_heads=4, head_dim=8, num_hidden_layers=3, hidden_size=64,
        num_global_heads=2, local_window=7, sink_tokens=2, position_embedding="rope", vocab_size=99,
    )  # fmt: skip
    plan = compare_training(TrainingSetup(config, 512, 4, 8, context_parallel=4), Rates())[0]
    assert content["plans"][0]["parameters"] == plan.parameters
    assert content["plans"][0]["flops"]["total"] == plan.flops.total
    assert content["plans"][0]["layer_bytes_sent"]["sinks"] == plan.layer.sinks


def test_what_does_not_fit_is_marked(capsys):
    out = planned(capsys, *CUT, "--memory", "1MiB")
    assert out.count(" !") >= 6 and "! more than 1 MiB" in out
    assert "! more than" not in planned(capsys, *CUT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks"], "--ranks"),
        (["--ranks", "0"], "--ranks must be an integer >= 1, got 0"),
        (["--ranks", "8", "--context-parallel", "3"], "--context-parallel must divide the 8 ranks, got 3"),
        (["--ranks", "8", "--context-parallel", "1"], "--batch must be a multiple of 8"),
        (["--ranks", "4", "--shards", "3"], "--shards must divide the 4 ranks, got 3"),
        (["--ranks", "4", "--parallel", "ddp", "--shards", "2"], "--shards goes only with parallel fsdp"),
        (["--ranks", "4", "--parallel", "tp"], "--parallel"),
        (["--ranks", "4", "--micro-batch-size", "0"], "--micro-batch-size must be an integer >= 1, got 0"),
        (["--ranks", "4", "--overlap", "2"], "--overlap must be a number >= 0 and <= 1, got 2.0"),
        (["--ranks", "4", "--matrix-share", "0"], "--matrix-share must be a number > 0 and <= 1, got 0.0"),
        (["--ranks", "4", "--network-bandwidth", "-1"], "--network-bandwidth must be a number > 0, got -1.0"),
        (["--ranks", "4", "--latency", "nan"], "--latency must be a number >= 0, got nan"),
        (["--ranks", "4", "--memory", "much"], "--memory must be a size such as 4GiB"),
        (["--paper-runs", "--peak-tflops", "0"], "--peak-tflops must be a number > 0, got 0.0"),
    ],
    ids=" ".join,
)
def test_wrong_usage(fails, flags, message):
    sizes = [] if "--paper-runs" in flags else ["--length", "64", "--batch", "4", "--preset", "tiny"]
    assert message in " ".join(fails(2, "plan", *flags, *sizes).split())


def test_the_papers_runs(capsys):
    out = planned(capsys, "--paper-runs")
    content = json.loads(planned(capsys, "--paper-runs", "--json"))
    for run, row in zip(paper_runs(), content["runs"], strict=True):
        assert f"\n {run.name} " in out
        assert run.command() == row["command"] and row["name"] == run.name
        assert run.command() in " ".join(line.strip(" \\") for line in out.splitlines())
        assert row["memory_bytes"]["total"] < 0.9 * 80 * 2**30
    assert content["rates"]["bf16"]["peak_tflops"] > 10 * content["rates"]["fp32"]["peak_tflops"]

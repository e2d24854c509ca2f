"""Tokens per second, of training alone, and the share of the device's peak that they are."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.training.runs import SettingsFor

from longshort.model import LongShortConfig, parameter_count
from longshort.training import loop, recorder
from longshort.training.loop import Progress, train
from longshort.training.metrics import read_metrics
from longshort.training.parallel import Ranks
from longshort.training.run import plan_run
from longshort.training.utilization import published_peak, seconds_at_peak
from longshort.training.validation import Validation

TOKENS = 4 * 48


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that advances by given seconds whenever a given function is called."""
    now = 0.0
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: now))

    def takes(owner: Any, name: str, seconds: float) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, timed)

    return takes


@pytest.mark.parametrize("on_spike", [None, "rollback"])
def test_the_speed_is_that_of_training_with_all_that_a_gpu_was_waited_for(
    settings_for: SettingsFor, pass_time: Any, on_spike: str | None
) -> None:
    pass_time(loop, "optimizer_step", 1.0)
    pass_time(Ranks, "reduce_mean", 10.0)  # for loss and norm: the GPU is waited for
    pass_time(Ranks, "wait", 100.0)  # before a checkpoint
    pass_time(loop, "save_checkpoint", 1e4)
    pass_time(Validation, "measure", 1e5)
    pass_time(Progress, "on_start", 1e6)
    settings = settings_for(
        steps=12, log_every=4, monitor_every=0, evaluate_every=6, checkpoint_every=5, on_spike=on_spike,
        tensorboard=False,
    )  # fmt: skip
    train(settings)
    seconds = {record["step"]: TOKENS / record["tokens_per_second"] for record in read_metrics(settings.out)}
    expected = {4: (4 + 10) / 4, 6: (2 + 100 + 10) / 2, 8: (2 + 10) / 2, 12: (4 + 100 + 10) / 4}
    if on_spike is not None:  # every step is waited for
        expected = {4: 11, 6: 11 + 100 / 2, 8: 11, 12: 11 + 100 / 4}
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize("is_known", [True, False])
def test_the_share_of_a_peak_is_reported_where_it_is_known(settings_for: SettingsFor, is_known: bool) -> None:
    settings = settings_for(steps=2, evaluate_every=0, peak_tflops=0.5 if is_known else None)
    train(settings)
    run, _ = plan_run(settings_for("other", peak_tflops=0.5))
    seconds = seconds_at_peak(run, Ranks(torch.device("cpu")))
    assert seconds is not None
    for record in read_metrics(settings.out):
        assert ("mfu" in record) == is_known
        if is_known:
            assert list(record)[5:7] == ["tokens_per_second", "mfu"]
            assert record["mfu"] == pytest.approx(record["tokens_per_second"] * seconds)


def test_a_token_takes_six_operations_a_weight_and_twelve_a_dimension_of_visible_pairs(
    settings_for: SettingsFor,
) -> None:
    run, _ = plan_run(settings_for(peak_tflops=2.0, batch_size=8))
    config = LongShortConfig.from_dict(run.model)
    tables = (config.vocab_size + config.max_position_embeddings) * config.hidden_size
    gains = (2 * config.num_hidden_layers + 1) * config.hidden_size
    weights = parameter_count(config) - tables - gains
    assert not config.tie_word_embeddings
    pairs = sum(
        min(position + 1, 48 if window is None else window)
        for layout in config.head_layouts()
        for window in layout.windows
        for position in range(48)
    )
    flops = 6 * weights + 12 * config.head_dim * pairs / 48
    for world_size in (1, 4):
        found = seconds_at_peak(run, Ranks(torch.device("cpu"), 0, world_size))
        assert found == pytest.approx(flops / (2e12 * world_size), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA A10G", None), ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 NVL", None), ("Tesla T4", None), ("", None),
    ],
)  # fmt: skip
def test_published_peaks_are_those_of_a_device_of_exactly_this_name(name: str, bf16: float | None) -> None:
    assert published_peak(name, "bf16") == (None if bf16 is None else pytest.approx(bf16))
    if bf16 is not None:
        fp32, tf32 = published_peak(name, "fp32"), published_peak(name, "tf32")
        assert fp32 is not None and tf32 is not None and fp32 <= tf32 < bf16


@pytest.mark.parametrize(
    ("precision", "matmul", "peak"),
    [("bf16", "highest", 312e12), ("fp32", "highest", 19.5e12), ("fp32", "high", 156e12)],
)
def test_the_peak_is_that_of_the_products(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch, precision: str, matmul: str, peak: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    gpu, cpu = (Ranks(torch.device(kind)) for kind in ("cuda", "cpu"))
    run, _ = plan_run(settings_for(precision=precision))
    given, _ = plan_run(settings_for(peak_tflops=peak / 1e12))
    assert seconds_at_peak(run, gpu) == pytest.approx(seconds_at_peak(given, cpu))
    assert seconds_at_peak(run, cpu) is None

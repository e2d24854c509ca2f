"""A step without a line reads nothing that a device computed, so that a GPU is never waited for."""

import collections
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import Recorder, SettingsFor
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from longshort.data import Batch
from longshort.model import LongShortForCausalLM, decoder, preset
from longshort.stability import AttentionMonitor, QKClip, scale_qk_learning_rate
from longshort.training.config import TrainConfig
from longshort.training.job import checkpoint_activations
from longshort.training.loop import train
from longshort.training.optimization import Objective, optimizer_step
from longshort.training.parallel import Ranks

LENGTH = 40
OF_MODEL = {"short_convolution", "sink_tokens", "sink_logits", "softcap", "position_embedding"}
READERS = {"item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose"}
READERS |= {"__bool__", "__int__", "__float__", "__index__", "__array__"}

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 3},
    "z-loss": {"z_loss": 1e-4},
    "separate-documents": {"separate_documents": True, "short_convolution": 3, "sink_tokens": 2},
    "unclipped": {"grad_clip": 0.0, "sink_logits": True, "softcap": 20.0},
    "rotary": {"position_embedding": "rope", "qk_learning_rate_factor": 0.5},
    "checkpointing": {"gradient_checkpointing": True, "position_embedding": "alibi"},
}


class Reads(TorchFunctionMode):
    """Counts what is read of tensors, by what `step` is at that time."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 1
        self.counts: collections.Counter[int] = collections.Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self.step] += func.__name__ in READERS
        with _Scalars(self):
            return func(*args, **(kwargs or {}))


class _Scalars(TorchDispatchMode):
    """Sees what torch itself reads."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        readers = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        self._reads.counts[self._reads.step] += func.overloadpacket in readers
        return func(*args, **(kwargs or {}))


class Steps(Recorder):
    """Tells which step is taken."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def on_step(self, step: int, record: dict[str, Any] | None) -> None:
        super().on_step(step, record)
        self._reads.step = step + 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [*SETTINGS.values(), {"qk_clip": 1.0}], ids=[*SETTINGS, "qk-clip"])
def test_only_steps_with_a_line_read(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], precision: str
) -> None:
    monkeypatch.setattr(decoder, "check_range", lambda *_: None)  # reads the ids on CPUs alone
    settings = settings_for(
        steps=9, log_every=6, monitor_every=4, evaluate_every=0, checkpoint_every=9, precision=precision,
        **changes,
    )  # fmt: skip
    reads = Reads()
    steps = Steps(reads)
    with reads:
        train(settings, steps)
    with_line = {step for step, record in steps.steps if record is not None}
    assert with_line == {1, 4, 6, 8, 9}
    assert {step for step, count in reads.counts.items() if count and step <= 9} == with_line


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_step_needs_no_values(changes: dict[str, Any]) -> None:
    """The device "meta" has none, and is not a CPU, whose values may be checked."""
    settings = TrainConfig(preset="tiny", data=Path("data"), out=Path("run"), batch_size=4, **changes)
    config = preset(
        "tiny", max_position_embeddings=LENGTH, hidden_size=32, num_attention_heads=2, head_dim=16,
        local_window=8, **{name: value for name, value in changes.items() if name in OF_MODEL},
    )  # fmt: skip
    model = LongShortForCausalLM(config).train()
    nn.Module.to(model, "meta")
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # a fused one has no meta kernel
    if settings.qk_learning_rate_factor != 1:
        scale_qk_learning_rate(model, optimizer, settings.qk_learning_rate_factor)
    clip, monitor = QKClip(model, 1.0), AttentionMonitor(model, None)
    tokens = torch.zeros(4, LENGTH, dtype=torch.int64)
    batch, ranks = Batch(tokens, tokens, tokens), Ranks(torch.device("meta"))
    for is_watched in (False, True):
        with monitor.observing() if is_watched else nullcontext():
            loss, norm = optimizer_step(Objective(model, settings), optimizer, batch, 1e-3, settings, ranks)
    measured = monitor.measurements(ranks.reduce_max, ranks.reduce_mean)
    clipped = clip.apply_on_device(measured.max_logit_by_head)
    for value in (loss, norm, clipped):
        with pytest.raises(RuntimeError, match="meta tensor"):
            value.item()
    with pytest.raises(NotImplementedError, match="meta tensor"):
        measured.read()


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("is_packed", [False, True])
def test_launches_of_the_gpu_kernels_need_no_values(
    monkeypatch: pytest.MonkeyPatch, is_packed: bool, sink_tokens: int, with_stats: bool
) -> None:
    pytest.importorskip("triton")
    from longshort.backends.triton import launching, operator

    launched = []
    monkeypatch.setattr(launching, "architecture_of", lambda device: "sm90")
    monkeypatch.setattr(operator, "launch", lambda kernel, *_, **__: launched.append(kernel))
    q = torch.empty(2, 4, LENGTH, 16, device="meta")
    k, v = torch.empty(2, 2, 2, LENGTH, 16, device="meta")
    segment_ids = torch.empty(2, LENGTH, dtype=torch.int64, device="meta") if is_packed else None
    common: Any = [(8, 8, 1 << 30, 1 << 30), sink_tokens, True, 0.25, None]
    out, row_max, log_sum, *_ = operator._forward(
        q, k, v, None, segment_ids, *common, out_dtype=torch.float32, with_stats=with_stats
    )
    operator._backward(q, k, v, None, segment_ids, out, row_max, log_sum, out, row_max, *common)
    assert len(launched) >= 7

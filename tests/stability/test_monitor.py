"""The monitor against logits computed in float64, and that watching changes nothing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from longshort.layers import LongShortAttention, Observation, Rotary
from longshort.layout import HeadLayout
from longshort.model import LongShortConfig, LongShortForCausalLM
from longshort.stability import MAX_LOGITS, AttentionMonitor, Reading

MIXED = HeadLayout((5, 5, None, None, 12, 12), num_kv_heads=3, sink_tokens=2)


class Stack(nn.Module):
    """Attention layers one after another."""

    def __init__(self, *layers: LongShortAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states, segment_ids)
        return hidden_states


def stack_of(*layouts: HeadLayout, **options) -> Stack:
    torch.manual_seed(0)
    return Stack(*(LongShortAttention(48, layout, head_dim=8, **options) for layout in layouts))


def weights_of_first_layer(model: Stack) -> Tensor:
    """Of queries, keys and values: (rows, embed_dim)."""
    return model.get_parameter("layers.0.qkv_proj.weight")


@contextmanager
def recording(model: Stack) -> Iterator[list[Observation]]:
    """The observations of the layers, in order."""
    seen: list[Observation] = []
    for layer in model.layers:
        layer.observer = seen.append  # pyright: ignore[reportArgumentType]
    yield seen
    for layer in model.layers:
        layer.observer = None  # pyright: ignore[reportArgumentType]


def exact(
    observation: Observation, layout: HeadLayout, segment_ids: Tensor | None, band: int | None = None
) -> tuple[Tensor, Tensor]:
    """Per head the largest visible |logit| and the mean entropy, in float64; global heads within the band."""
    q, k = observation.q.double(), observation.k.double().repeat_interleave(layout.group_size, dim=1)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    length = q.shape[2]
    query, key = torch.arange(length)[:, None], torch.arange(length)
    max_logits, entropies = [], []
    for head, window in enumerate(layout.windows):
        visible = (key <= query).expand(len(q), -1, -1).clone()
        if segment_ids is not None:
            same = segment_ids[:, :, None] == segment_ids[:, None]
            visible &= same & (segment_ids >= 0)[:, None]
        if window is not None:
            sinks = _first_of_segments(visible, layout.sink_tokens)
            visible &= (query - key < window) | sinks
        elif band is not None:
            visible &= query - key < band
        scores = logits[:, head].masked_fill(~visible, -math.inf)
        max_logits.append(logits[:, head].abs()[visible].amax())
        rows = visible.any(-1)
        p = scores[rows].softmax(-1)
        entropies.append(torch.special.entr(p).sum(-1).mean())
    return torch.stack(max_logits), torch.stack(entropies)


def assert_close(values: list[float], truth: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), truth, rtol=1e-5, atol=1e-6)


def _first_of_segments(visible: Tensor, count: int) -> Tensor:
    """The first keys among those of the same segment, which a causal query sees."""
    return visible & (visible.cumsum(-1) <= count)


def packed_segments() -> Tensor:
    """Two rows of 70 tokens: three documents and padding; one document alone."""
    packed = torch.tensor([0] * 23 + [1] * 9 + [2] * 33 + [-1] * 5)
    return torch.stack([packed, torch.zeros(70, dtype=torch.int64)])


@pytest.mark.parametrize("segment_ids", [None, packed_segments()], ids=["one document", "packed"])
@pytest.mark.parametrize("band", [1, 5, 200])
def test_reading_equals_the_logits_in_float64(band: int, segment_ids: Tensor | None) -> None:
    layouts = [MIXED, HeadLayout.split(6, 1, 7)]
    model = stack_of(*layouts, rotary=Rotary())
    hidden_states = 3 * torch.randn(2, 70, 48)
    monitor = AttentionMonitor(model, band)
    with monitor.observing():
        model(hidden_states, segment_ids)
    reading = monitor.reading()
    with recording(model) as seen:
        model(hidden_states, segment_ids)

    truth = [exact(*pair, segment_ids) for pair in zip(seen, layouts, strict=True)]
    for layer, (max_logits, entropies) in enumerate(truth):
        assert_close(reading.max_logit_by_head[layer], max_logits)
        assert_close(reading.entropy_by_head[layer], entropies)
    in_band = [exact(*pair, segment_ids, band)[0] for pair in zip(seen, layouts, strict=True)]
    local = [truth[i][0][list(layouts[i].local_heads)].max().item() for i in range(2)]
    over_all = [truth[i][0][list(layouts[i].global_heads)].max().item() for i in range(2)]
    banded = [in_band[i][list(layouts[i].global_heads)].max().item() for i in range(2)]
    assert reading.max_logit == pytest.approx(max(local + over_all), rel=1e-5)
    assert reading.max_logit_local == pytest.approx(max(local), rel=1e-5)
    assert reading.max_logit_global == pytest.approx(max(over_all), rel=1e-5)
    assert reading.max_logit_global_in_band == pytest.approx(max(banded), rel=1e-5)


@pytest.mark.parametrize("band", [64, 100, 300])
def test_band_is_exact_across_the_tiles_of_a_long_sequence(band: int) -> None:
    layout = HeadLayout((None,) * 4, num_kv_heads=2)
    model = stack_of(layout)
    hidden_states = torch.randn(1, 700, 48)
    monitor = AttentionMonitor(model, band)
    readings = []
    for place in (None, 0, 63, 64, 255, 256, 350, 699):  # one loud query meets one loud key just inside
        loud = hidden_states.clone()
        if place is not None:
            loud[:, [place, max(0, place - band + 1)]] *= 50
        with monitor.observing():
            model(loud)
        readings.append(monitor.reading())
        with recording(model) as seen:
            model(loud)
        truth = exact(seen[0], layout, None, band)[0].max().item()
        assert readings[-1].max_logit_global_in_band == pytest.approx(truth, rel=1e-5)
    assert readings[0].max_logit_global_in_band < readings[1].max_logit_global_in_band


def test_pairs_outside_the_band_do_not_count() -> None:
    layout = HeadLayout((None,) * 6)
    model = stack_of(layout)
    hidden_states = torch.randn(1, 50, 48)
    hidden_states[:, [3, 40]] *= 100  # 37 apart
    values = {}
    for band in (38, 37):
        monitor = AttentionMonitor(model, band)
        with monitor.observing():
            model(hidden_states)
        with recording(model) as seen:
            model(hidden_states)
        values[band] = monitor.reading().max_logit_global_in_band
        assert values[band] == pytest.approx(exact(seen[0], layout, None, band)[0].max().item(), rel=1e-5)
    assert values[38] > values[37]


@pytest.mark.parametrize("precision", ["input", "fp32", "bf16", "bf16-flash"])
def test_under_autocast_logits_are_those_of_the_attention(precision: str) -> None:
    layout = HeadLayout.split(6, 2, 4)
    model = stack_of(layout, attention_precision=precision)
    hidden_states = 3 * torch.randn(2, 40, 48)
    monitor = AttentionMonitor(model, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with monitor.observing():
            model(hidden_states)
        with recording(model) as seen:
            model(hidden_states)
    assert seen[0].q.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    reading = monitor.reading()
    max_logits = exact(seen[0], layout, None)[0]
    banded = exact(seen[0], layout, None, 4)[0]
    assert_close(reading.max_logit_by_head[0], max_logits)
    assert reading.max_logit_global_in_band == pytest.approx(banded[4:].max().item(), rel=1e-5)


def loss_and_gradients(
    model: LongShortForCausalLM, batches: list[Tensor], around: Callable | None = None
) -> list[Tensor]:
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return losses + [gradient.clone() for gradient in gradients if gradient is not None]


def language_model(**options) -> LongShortForCausalLM:
    torch.manual_seed(0)
    config = LongShortConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        max_position_embeddings=64, local_window=6, num_global_heads=2, **options,
    )  # fmt: skip
    return LongShortForCausalLM(config).train()


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2, "qk_norm": True, "softcap": 5.0}])
def test_outputs_and_gradients_are_bit_identical_with_and_without(options: dict) -> None:
    model = language_model(**options)
    batches = list(torch.randint(50, (2, 3, 64)))
    plain = loss_and_gradients(model, batches)
    monitor = AttentionMonitor(model, 6)
    with monitor.observing():
        watched = loss_and_gradients(model, batches)
    after = loss_and_gradients(model, batches)
    assert all(torch.equal(*pair) for pair in zip(plain, watched, strict=True))
    assert all(torch.equal(*pair) for pair in zip(plain, after, strict=True))


def test_max_over_passes_and_mean_of_their_entropies() -> None:
    model = language_model()
    monitor = AttentionMonitor(model, 6)
    batches = list(torch.randint(50, (3, 2, 64)))
    single = []
    for batch in batches:
        with monitor.observing():
            model(batch)
        single.append(monitor.reading())
    for batch in batches:  # the same in one go, entered several times
        with monitor.observing():
            model(batch)
    joint = monitor.reading()
    by_head = torch.tensor([reading.max_logit_by_head for reading in single])
    entropies = torch.tensor([reading.entropy_by_head for reading in single])
    assert joint.max_logit_by_head == by_head.amax(0).tolist()
    torch.testing.assert_close(torch.tensor(joint.entropy_by_head), entropies.mean(0))
    assert joint.max_logit_global_in_band == max(reading.max_logit_global_in_band or 0 for reading in single)
    assert len({reading.max_logit for reading in single}) == 3


def test_recomputed_passes_do_not_distort() -> None:
    model = language_model()
    batches = list(torch.randint(50, (2, 3, 64)))
    monitor = AttentionMonitor(model, 6)
    with monitor.observing():
        plain = loss_and_gradients(model, batches)
    reading = monitor.reading()
    model.activation_checkpointing_enable()
    with monitor.observing():
        recomputed = loss_and_gradients(model, batches)
    assert monitor.reading() == reading
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize(
    ("bad", "seen"), [(math.nan, math.isnan), (math.inf, lambda value: not math.isfinite(value))]
)
def test_what_is_not_finite_shows(bad: float, seen: Callable[[float], bool]) -> None:
    model = stack_of(HeadLayout.split(2, 1, 4), HeadLayout.split(2, 1, 4))
    with torch.no_grad():
        weights_of_first_layer(model)[8, 0] = bad  # a query of the global head
    monitor = AttentionMonitor(model, 4)
    with monitor.observing():
        model(torch.randn(1, 20, 48))
    reading = monitor.reading()
    assert seen(reading.max_logit_by_head[0][1])
    assert math.isfinite(reading.max_logit_by_head[0][0])
    assert reading.max_logit_global is not None
    assert reading.max_logit_global_in_band is not None
    assert seen(reading.max_logit_global)
    assert seen(reading.max_logit_global_in_band)
    assert seen(reading.max_logit)


def test_infinite_logit_is_infinite() -> None:
    model = stack_of(HeadLayout((None,)))
    monitor = AttentionMonitor(model, 4)
    with torch.no_grad():
        weights_of_first_layer(model).abs_()
    with monitor.observing():
        model(torch.full((1, 5, 48), 1e30))  # q and k of 1e30: their product overflows
    reading = monitor.reading()
    assert reading.max_logit == math.inf
    assert reading.max_logit_global_in_band == math.inf


def test_groups_that_a_model_lacks_are_none() -> None:
    hidden_states = torch.randn(1, 20, 48)
    cases = {
        "all local": (HeadLayout((4, 4)), 4),
        "all global": (HeadLayout((None, None)), 4),
        "no band": (HeadLayout((4, None)), None),
    }
    readings: dict[str, Reading] = {}
    for name, (layout, band) in cases.items():
        model = stack_of(layout)
        monitor = AttentionMonitor(model, band)
        with monitor.observing():
            model(hidden_states)
        readings[name] = monitor.reading()
    local, everywhere, no_band = readings.values()
    assert (local.max_logit_global, local.max_logit_global_in_band) == (None, None)
    assert local.max_logit == local.max_logit_local
    assert everywhere.max_logit_local is None
    assert everywhere.max_logit == everywhere.max_logit_global
    assert no_band.max_logit_global_in_band is None
    assert list(local.as_metrics()) == [*MAX_LOGITS, "max_logit_by_head", "entropy_by_head"]
    assert local.as_metrics()["max_logit_global"] is None
    assert local.as_metrics()["max_logit_by_head"] == local.max_logit_by_head


def test_reductions_join_the_numbers_of_all_processes() -> None:
    model = stack_of(HeadLayout.split(3, 1, 4), HeadLayout.split(3, 1, 4))
    monitor = AttentionMonitor(model, 4)
    hidden_states = torch.randn(1, 20, 48)

    def observed() -> None:
        with monitor.observing():
            model(hidden_states)

    observed()
    alone = monitor.reading()
    observed()
    joint = monitor.reading(reduce_max=lambda values: values + 100, reduce_mean=lambda values: values / 2)
    for alone_heads, joint_heads in zip(alone.max_logit_by_head, joint.max_logit_by_head, strict=True):
        assert joint_heads == [value + 100 for value in alone_heads]
    for alone_heads, joint_heads in zip(alone.entropy_by_head, joint.entropy_by_head, strict=True):
        assert joint_heads == [value / 2 for value in alone_heads]
    assert alone.max_logit_global_in_band is not None
    assert joint.max_logit_global_in_band == alone.max_logit_global_in_band + 100
    assert joint.max_logit == alone.max_logit + 100


def test_observers_are_gone_after_an_error() -> None:
    model = stack_of(MIXED)
    monitor = AttentionMonitor(model, 4)
    with pytest.raises(ZeroDivisionError), monitor.observing():
        raise ZeroDivisionError
    assert all(layer.observer is None for layer in model.layers)


def test_reading_of_nothing_is_refused() -> None:
    model = stack_of(MIXED)
    monitor = AttentionMonitor(model, 4)
    with pytest.raises(RuntimeError, match="no pass of the model was observed"):
        monitor.reading()
    with monitor.observing():
        model(torch.randn(1, 9, 48))
    monitor.reading()
    with pytest.raises(RuntimeError, match="no pass of the model was observed"):
        monitor.reading()


@pytest.mark.parametrize("band", [0, -3, 2.5, True, "4"])
def test_wrong_band_is_refused(band: object) -> None:
    with pytest.raises(ValueError, match="band must be an integer >= 1"):
        AttentionMonitor(stack_of(MIXED), band)  # pyright: ignore[reportArgumentType]


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have LongShortAttention layers, got Linear"):
        AttentionMonitor(nn.Linear(2, 2), 4)

"""The monitor against logits computed in float64, and that watching changes nothing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from longshort.attention import attention
from longshort.layers import LongShortAttention, Observation, Rotary
from longshort.layout import HeadLayout
from longshort.model import LongShortConfig, LongShortForCausalLM
from longshort.stability import MAX_LOGITS, ROW_RANGES, AttentionMonitor, Reading

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
    max_logits, entropies = [], []
    for logits, visible in visible_logits(observation, layout, segment_ids, band):
        max_logits.append(logits.abs()[visible].amax())
        p = logits.masked_fill(~visible, -math.inf)[visible.any(-1)].softmax(-1)
        entropies.append(torch.special.entr(p).sum(-1).mean())
    return torch.stack(max_logits), torch.stack(entropies)


def exact_row_ranges(
    observation: Observation, layout: HeadLayout, segment_ids: Tensor | None, band: int | None = None
) -> Tensor:
    """Per head the largest range of a row, in float64; global heads within the band."""
    ranges = []
    for logits, visible in visible_logits(observation, layout, segment_ids, band):
        rows = visible.any(-1)
        largest = logits.masked_fill(~visible, -math.inf)[rows].amax(-1)
        smallest = logits.masked_fill(~visible, math.inf)[rows].amin(-1)
        ranges.append((largest - smallest).amax() if rows.any() else torch.zeros((), dtype=torch.float64))
    return torch.stack(ranges)


def visible_logits(
    observation: Observation, layout: HeadLayout, segment_ids: Tensor | None, band: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per head all logits in float64, and which of them are visible (global heads: and in the band)."""
    q, k = observation.q.double(), observation.k.double().repeat_interleave(layout.group_size, dim=1)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    q_len, kv_len = q.shape[2], k.shape[2]
    query, key = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    for head, window in enumerate(layout.windows):
        visible = (key <= query).expand(len(q), -1, -1).clone()
        if segment_ids is not None:
            queries = segment_ids[:, kv_len - q_len :, None]
            visible &= (queries == segment_ids[:, None]) & (queries >= 0)
        if window is not None:
            sinks = _first_of_segments(visible, layout.sink_tokens)
            visible &= (query - key < window) | sinks
        elif band is not None:
            visible &= query - key < band
        yield logits[:, head], visible


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


@settings(max_examples=60)
def show(layer: LongShortAttention, observation: Observation) -> None:
    """Give those who watch the layer an observation that no pass of it made."""
    for observer in layer._observers:
        observer(observation)


@given(data=st.data())
def test_row_ranges_equal_the_logits_in_float64(data: st.DataObject) -> None:
    group_size = data.draw(st.integers(1, 3), "group size")
    windows = data.draw(st.lists(st.sampled_from([None, None, 1, 3, 64, 90]), min_size=1, max_size=3))
    heads = tuple(window for window in windows for _ in range(group_size))
    layout = HeadLayout(heads, len(windows), data.draw(st.sampled_from([0, 0, 2, 70]), "sinks"))
    kv_len = data.draw(st.sampled_from([1, 2, 30, 200, 700]), "kv_len")
    past = data.draw(st.integers(0, kv_len - 1), "past")
    band = data.draw(st.sampled_from([None, 1, 5, 100]), "band")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "seed"))
    batch, head_dim = 2, 4
    q = torch.randn(batch, len(heads), kv_len - past, head_dim, generator=generator)
    k = torch.randn(batch, len(windows), kv_len, head_dim, generator=generator)
    segment_ids = None
    if data.draw(st.booleans(), "packed"):  # an id may come in several runs, and nobody sees what is negative
        runs = torch.randint(-1, 3, (batch, kv_len), generator=generator)
        borders = torch.rand(batch, kv_len, generator=generator) < 0.03
        first_of_run = (torch.arange(kv_len) * borders).cummax(-1).values
        segment_ids = runs.gather(1, first_of_run)

    layer = LongShortAttention(8, layout, head_dim)
    monitor = AttentionMonitor(Stack(layer), band, row_range=True)
    with monitor.observing():
        _, stats = attention(q, k, k, layout, segment_ids=segment_ids, return_stats=True)
        observation = Observation(q, k, k, stats, {"segment_ids": segment_ids})
        show(layer, observation)
    reading = monitor.reading()

    is_global = torch.tensor([window is None for window in heads])
    truth = exact_row_ranges(observation, layout, segment_ids)
    in_band = exact_row_ranges(observation, layout, segment_ids, band)[is_global]
    expected = {
        "row_range": truth,
        "row_range_local": truth[~is_global],
        "row_range_global": truth[is_global],
        "row_range_global_in_band": in_band if band is not None else in_band[:0],
    }
    for name, ranges in expected.items():
        largest = ranges.amax().item() if len(ranges) else None
        assert getattr(reading, name) == (pytest.approx(largest, rel=1e-5, abs=1e-6) if len(ranges) else None)
    assert list(reading.as_metrics())[:8] == [*MAX_LOGITS, *ROW_RANGES]


def test_row_range_is_that_of_one_row() -> None:
    """Neither a row's common shift nor the difference between rows counts."""
    layout = HeadLayout((None,))
    layer = LongShortAttention(8, layout, head_dim=1)
    monitor = AttentionMonitor(Stack(layer), 1, row_range=True)
    q = torch.tensor([1.0, 1.0, -1.0]).view(1, 1, 3, 1)
    k = torch.tensor([100.0, 103.0, 99.0]).view(1, 1, 3, 1)
    with monitor.observing():
        _, stats = attention(q, k, k, layout, return_stats=True)
        show(layer, Observation(q, k, k, stats, {}))
    reading = monitor.reading()
    assert reading.max_logit == 103
    assert reading.row_range == reading.row_range_global == 4
    assert reading.row_range_global_in_band == 0  # each row sees one key
    assert reading.row_range_local is None


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
    monitor = AttentionMonitor(model, 6, row_range=True)
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
    monitor = AttentionMonitor(model, 4, row_range=True)
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
    assert reading.row_range_global is not None
    assert reading.row_range_local is not None
    assert seen(reading.row_range_global)
    assert seen(reading.row_range_local)  # in the second layer, which reads what the first one wrote


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
    assert (local.row_range, local.row_range_local) == (None, None)  # nobody asked
    assert local.as_metrics()["max_logit_global"] is None
    assert local.as_metrics()["max_logit_by_head"] == local.max_logit_by_head


def test_reductions_join_the_numbers_of_all_processes() -> None:
    model = stack_of(HeadLayout.split(3, 1, 4), HeadLayout.split(3, 1, 4))
    monitor = AttentionMonitor(model, 4, row_range=True)
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
    for name in ROW_RANGES:
        assert getattr(joint, name) == getattr(alone, name) + 100


def test_what_watched_before_watches_after_an_error() -> None:
    model = stack_of(MIXED)
    x, seen = torch.randn(2, 9, 48), []
    for layer in model.layers:
        layer.observer = seen.append  # pyright: ignore[reportArgumentType]
    outer, inner = AttentionMonitor(model, 4), AttentionMonitor(model, 4)
    with outer.observing():
        with suppress(ZeroDivisionError), inner.observing():
            model(x)
            raise ZeroDivisionError
        model(x)
    model(x)
    assert len(seen) == 3 * len(model.layers)
    assert inner.reading() == outer.reading()
    for monitor in (outer, inner):
        with pytest.raises(RuntimeError, match="no pass"):
            monitor.reading()


def test_monitors_come_and_go_in_any_order() -> None:
    """Each of two monitors reads what it would read alone."""
    model = stack_of(MIXED)
    passes = [factor * torch.randn(2, 9, 48) for factor in (1.0, 3.0, 2.0)]
    readings = []
    for watched in (passes[:2], passes[1:]):
        monitor = AttentionMonitor(model, 4, row_range=True)
        with monitor.observing():
            for x in watched:
                model(x)
        readings.append(monitor.reading())
    first, second = (AttentionMonitor(model, 4, row_range=True) for _ in range(2))
    watching_first, watching_second = first.observing(), second.observing()
    watching_first.__enter__()
    model(passes[0])
    watching_second.__enter__()
    model(passes[1])
    watching_first.__exit__(None, None, None)
    model(passes[2])
    watching_second.__exit__(None, None, None)
    model(passes[1] * 9)
    assert [first.reading(), second.reading()] == readings
    assert not any(layer.is_observed for layer in model.layers)  # pyright: ignore[reportAttributeAccessIssue]


def test_watching_again_compiles_nothing_new() -> None:
    torch.compiler.reset()
    model = stack_of(MIXED)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    x, monitor = torch.randn(2, 9, 48), AttentionMonitor(model, 4)
    counts = []
    with torch.no_grad():
        for _ in range(4):
            compiled(x)
            with monitor.observing():
                compiled(x)
            counts.append(len(graphs))
    assert counts[1] == counts[-1], counts
    assert monitor.reading().max_logit > 0


def test_an_observer_that_was_not_added_is_refused() -> None:
    layer = LongShortAttention(8, HeadLayout((None,)), head_dim=8)
    with pytest.raises(ValueError, match="observer must have been added"):
        layer.remove_observer(print)


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


def test_wrong_row_range_is_refused() -> None:
    with pytest.raises(ValueError, match="row_range must be True or False, got 1"):
        AttentionMonitor(stack_of(MIXED), 4, row_range=1)  # pyright: ignore[reportArgumentType]


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have LongShortAttention layers, got Linear"):
        AttentionMonitor(nn.Linear(2, 2), 4)

"""Steps that are recorded once and run for each token, as CUDA graphs and compilers do it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.interpreted.tape import recording
from tests.model.models import make_ids, make_model
from torch import Tensor

from longshort import HeadLayout, attention
from longshort.backends import cpu
from longshort.cache import LayerCache

LAYOUTS = {
    "plain": HeadLayout((None, 5, 5)),
    "sinks": HeadLayout((None, 4, 4, None), 2 * 2, sink_tokens=3),
    "shared": HeadLayout((None, None, 6, 6, 3, 3), 3, sink_tokens=1),
    "local": HeadLayout((2, 7)),
}
MAX_LENGTH = 40


@pytest.fixture(autouse=True)
def _by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "supports_cached", lambda q, length: False)


class Sequence:
    """Random queries, keys and values of a layer, a cache, and what attention over all of them gives."""

    def __init__(self, layout: HeadLayout, padding: int | None, **options: Any) -> None:
        self.cache = LayerCache(layout, rollback=options.pop("rollback", 0), max_length=MAX_LENGTH)
        heads = layout.num_heads, layout.num_kv_heads, layout.num_kv_heads
        self.tensors = [torch.randn(2, count, MAX_LENGTH, 8) for count in heads]
        self.options = options
        self.ids = None
        if padding is not None:
            self.ids = torch.zeros(2, MAX_LENGTH, dtype=torch.int64)
            self.ids[0, :padding] = -1

    def feed(self, begin: int, end: int) -> Tensor:
        """Attend from these positions, in a call of the host's."""
        ids = None if self.ids is None else self.ids[:, :end]
        new = (x[:, :, begin:end] for x in self.tensors)
        return self.cache.attend(*new, segment_ids=ids, **self.options)

    def expected(self, begin: int, end: int) -> Tensor:
        q, k, v = (x[:, :, :end] for x in self.tensors)
        ids = None if self.ids is None else self.ids[:, :end]
        whole = attention(q, k, v, self.cache.layout, segment_ids=ids, backend="reference", **self.options)
        return whole[:, :, begin:end]

    def check(self, out: Tensor, begin: int, end: int) -> None:
        torch.testing.assert_close(out, self.expected(begin, end), rtol=1e-5, atol=1e-5)

    def record(self) -> None:
        """Record a step for the position that comes."""
        self._new = [torch.empty(x.shape[0], x.shape[1], 1, 8) for x in self.tensors]
        self._ids = None if self.ids is None else torch.full_like(self.ids, -1)
        self._set(self.cache.length)
        with recording() as self._tape:
            self._out = self.cache.attend(*self._new, segment_ids=self._ids, **self.options)

    def replay(self, position: int) -> Tensor:
        self._set(position)
        self._tape.replay()
        return self._out

    @property
    def recorded(self) -> Tensor:
        return self._out

    def _set(self, position: int) -> None:
        for new, x in zip(self._new, self.tensors, strict=True):
            new.copy_(x[:, :, position : position + 1])
        if self._ids is not None and self.ids is not None:
            self._ids[:, : position + 1] = self.ids[:, : position + 1]


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_runs_for_each_token(layout: HeadLayout, padding: int | None) -> None:
    slopes, sinks = torch.rand(layout.num_heads) / 4, torch.randn(layout.num_heads)
    sequence = Sequence(layout, padding, alibi_slopes=slopes, sink_logits=sinks, softcap=3.0)
    sequence.feed(0, 6)
    sequence.record()
    sequence.check(sequence.recorded, 6, 7)
    for position in range(7, 17):
        sequence.check(sequence.replay(position), position, position + 1)
    assert sequence.cache.length == 17
    sequence.check(sequence.feed(17, 21), 17, 21)  # the host continues
    sequence.check(sequence.feed(21, 22), 21, 22)
    for position in range(22, 26):  # and the recording
        sequence.check(sequence.replay(position), position, position + 1)
    assert sequence.cache.nbytes_used == 2 * layout.kv_bytes(26, 8, torch.float32)
    twin = copy.deepcopy(sequence.cache)
    assert twin.length == 26
    sequence.check(sequence.replay(26), 26, 27)
    sequence.cache = twin
    sequence.check(sequence.feed(26, 28), 26, 28)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tokens_are_taken_back(layout: HeadLayout) -> None:
    sequence = Sequence(layout, None, rollback=4)
    sequence.feed(0, 11)
    sequence.record()
    for position in range(12, 15):
        sequence.replay(position)
    sequence.cache.crop(12)
    for position in range(12, 20):
        sequence.check(sequence.replay(position), position, position + 1)


def test_sequences_change_places() -> None:
    sequence = Sequence(LAYOUTS["sinks"], 1)
    sequence.feed(0, 8)
    sequence.record()
    sequence.replay(9)
    assert sequence.ids is not None
    order = torch.tensor([1, 0])
    sequence.cache.reorder(order)
    sequence.tensors = [x[order] for x in sequence.tensors]
    sequence.ids = sequence.ids[order]
    for position in range(10, 14):
        sequence.check(sequence.replay(position), position, position + 1)


@pytest.mark.parametrize("padding", [None, 1])
def test_a_cache_is_used_again(padding: int | None) -> None:
    sequence = Sequence(LAYOUTS["sinks"], padding)
    sequence.feed(0, 6)
    sequence.record()
    for position in range(7, 12):
        sequence.replay(position)
    sequence.cache.reset()
    assert sequence.replay(0).isnan().all()  # there is no memory
    sequence.cache.reset()
    assert sequence.cache.length == 0
    sequence.tensors = [torch.randn_like(x) for x in sequence.tensors]
    if sequence.ids is not None:
        sequence.ids = sequence.ids.roll(1, 0) * 2 + 3 * (sequence.ids.roll(1, 0) >= 0)
    sequence.check(sequence.feed(0, 7), 0, 7)
    for position in range(7, 13):
        sequence.check(sequence.replay(position), position, position + 1)
    assert sequence.cache.length == 13
    sequence.check(sequence.feed(13, 15), 13, 15)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), HeadLayout((64, 64))], ids=[*LAYOUTS, "wide"])
def test_a_full_cache_gives_nan(layout: HeadLayout, with_ids: bool) -> None:
    sequence = Sequence(layout, 0 if with_ids else None)
    sequence.feed(0, MAX_LENGTH - 2)
    sequence.record()
    assert sequence.replay(MAX_LENGTH - 1).isfinite().all()
    held = [store.data.clone() for store in sequence.cache.stores if store.data is not None]
    assert sequence.replay(MAX_LENGTH - 1).isnan().all()
    now = [store.data for store in sequence.cache.stores if store.data is not None]
    for old, new, store in zip(held, now, sequence.cache.stores, strict=True):
        assert torch.equal(old, new) or store.window is not None


def test_modes_of_inference_mix() -> None:
    sequence = Sequence(LAYOUTS["sinks"], 1)
    with torch.inference_mode():
        sequence.feed(0, 3)
    sequence.check(sequence.feed(3, 4), 3, 4)
    sequence.record()
    for position in range(5, 12):
        sequence.check(sequence.replay(position), position, position + 1)
    assert sequence.cache.length == 12
    sequence.cache.reset()
    sequence.feed(0, 5)
    sequence.check(sequence.replay(5), 5, 6)


@pytest.mark.parametrize(
    ("length", "options"),
    [(None, {}), (MAX_LENGTH, {"backend": "blockwise"}), (MAX_LENGTH, {"round_probabilities": True})],
)
def test_numbers_of_the_host_are_not_captured(length: int | None, options: dict[str, Any]) -> None:
    """A graph would write every token to the same place."""
    cache = LayerCache(LAYOUTS["plain"], max_length=length)
    new = torch.randn(3, 2, 3, 1, 8).unbind()
    cache.attend(*new, **options)
    with recording(), pytest.raises(ValueError, match="must take one token, after a call"):
        cache.attend(*new, **options)


def test_sinks_must_be_known() -> None:
    sequence = Sequence(LAYOUTS["sinks"], None)
    sequence.feed(0, 2)
    with recording(), pytest.raises(ValueError, match="whose sinks are all known"):
        sequence.cache.attend(*(x[:, :, 2:3] for x in sequence.tensors))


def test_another_segment_is_refused_in_each_step() -> None:
    sequence = Sequence(LAYOUTS["sinks"], 0)
    sequence.feed(0, 6)
    sequence.record()
    sequence.replay(7)
    assert sequence.ids is not None
    sequence.ids[1, 8] = 1
    with pytest.raises(RuntimeError, match="one segment per sequence"):
        sequence.replay(8)


def test_what_cannot_be_recorded_is_refused() -> None:
    sequence = Sequence(LAYOUTS["plain"], None)
    sequence.feed(0, 4)
    sequence.record()
    new = [x[:, :, 5:7] for x in sequence.tensors]
    with recording(), pytest.raises(ValueError, match="takes one token in each of them"):
        sequence.cache.attend(*new)
    with recording(), pytest.raises(ValueError, match="backend must be 'auto' or 'triton'"):
        sequence.cache.attend(*(x[:, :, :1] for x in new), backend="blockwise")
    with recording(), pytest.raises(ValueError, match=r"segment_ids must be \(batch, kv_len\) = \(2, 40\)"):
        sequence.cache.attend(*(x[:, :, :1] for x in new), segment_ids=torch.zeros(2, 6, dtype=torch.int64))


def padding_of(is_padded: bool, length: int, longest: int) -> dict[str, Any]:
    """The argument of a model that masks padding, if there is any."""
    return {"attention_mask": mask_of(length, longest)} if is_padded else {}


def mask_of(length: int, longest: int) -> Tensor:
    mask = (torch.arange(longest) < length).long().repeat(2, 1)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "fields", [{}, {"position_embedding": "rope", "sink_tokens": 2}], ids=["learned", "rope"]
)
def test_a_model_runs_for_each_token(fields: dict[str, Any], is_padded: bool) -> None:
    model = make_model(num_hidden_layers=2, **fields).eval()
    ids, longest = make_ids(length=16), 16
    with torch.no_grad():
        options = padding_of(is_padded, 16, 16)
        expected = model(ids, use_cache=False, **options).logits
        cache = model.new_cache(max_length=longest)
        model(ids[:, :8], past_key_values=cache, **padding_of(is_padded, 8, 16))
    token, mask = ids[:, 8:9].clone(), mask_of(9, longest)
    with recording() as tape:
        out = model(token, past_key_values=cache, **({"attention_mask": mask} if is_padded else {})).logits
    for position in range(9, 16):
        torch.testing.assert_close(out[:, 0], expected[:, position - 1], rtol=1e-4, atol=1e-5)
        token.copy_(ids[:, position : position + 1])
        mask.copy_(mask_of(position + 1, longest))
        tape.replay()
    assert cache.get_seq_length() == 16


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_a_compiled_model_has_one_graph_of_tensors(is_padded: bool) -> None:
    """Numbers of the host would be others in each step, and each a new CUDA graph."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        assert all(isinstance(x, Tensor) for x in inputs)
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    model = make_model(num_hidden_layers=2, sink_tokens=2).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = make_ids(length=14)
    with torch.no_grad():
        options = padding_of(is_padded, 14, 14)
        expected = model(ids, use_cache=False, **options).logits
        cache = model.new_cache(max_length=14)
        model(ids[:, :8], past_key_values=cache, **padding_of(is_padded, 8, 14))
        for position in range(8, 14):
            options = padding_of(is_padded, position + 1, 14)
            out = compiled(ids[:, position : position + 1], past_key_values=cache, **options).logits
            torch.testing.assert_close(out[:, 0], expected[:, position], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1

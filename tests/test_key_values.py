import pytest
import torch
from tests.layer_cases import LAYOUT, GrowingCache, make_input, make_layer

from longshort.attention import attention
from longshort.cache import LayerCache
from longshort.key_values import KeyValueCache, UpdatedCache


class ByHand(KeyValueCache):
    """A cache of another kind than ours: keeps every key, and counts how it is asked."""

    has_every_key = True

    def __init__(self):
        self.layout = LAYOUT
        self._cache = GrowingCache()
        self.calls = []

    @property
    def length(self):
        return self._cache.length

    def attend(self, q, k, v, **options):
        self.calls.append("attend")
        return attention(q, *self._cache.update(k, v), self.layout, **options)

    def update(self, k, v, segment_ids=None):
        self.calls.append("update")
        return self._cache.update(k, v)


class Attending:
    """An object of no class of ours that attends by itself."""

    def __init__(self):
        self._cache = LayerCache(LAYOUT)

    @property
    def length(self):
        return self._cache.length

    def attend(self, q, k, v, **options):
        return self._cache.attend(q, k, v, **options)

    def append(self, k, v, segment_ids=None):
        self._cache.append(k, v, segment_ids)


@pytest.mark.parametrize(
    "kind",
    [ByHand, GrowingCache, lambda: LayerCache(LAYOUT), Attending],
    ids=["own", "updatable", "ours", "attending"],
)
@torch.no_grad()
def test_every_kind_of_cache_serves_a_layer(kind):
    layer, x = make_layer(), make_input()
    whole, cache = layer(x), kind()
    parts = [layer(part, cache=cache) for part in x.split([2, 1, x.shape[1] - 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_an_observer_gets_every_key_through_update():
    layer, x, cache = make_layer(), make_input(), ByHand()
    layer(x[:, :3], cache=cache)
    seen = []
    layer.observer = lambda observation: seen.append(observation.k.shape[2])
    layer(x[:, 3:5], cache=cache)
    assert cache.calls == ["attend", "update"]
    assert seen == [5]


@torch.no_grad()
def test_an_object_that_attends_is_observed_only_while_it_is_empty():
    layer, x, cache = make_layer(), make_input(), Attending()
    seen = []
    layer.observer = lambda observation: seen.append(observation.k.shape[2])
    layer(x[:, :3], cache=cache)
    assert seen == [3] and cache.length == 3
    with pytest.raises(ValueError, match=r"keep every key while there is an observer.*got Attending"):
        layer(x[:, 3:], cache=cache)
    assert cache.length == 3


def test_a_layer_cache_returns_keys_only_while_it_has_them_all():
    cache = LayerCache(LAYOUT)
    k, v = torch.randn(2, 1, 3, 4, 8)
    assert cache.has_every_key
    assert all(x is y for x, y in zip(cache.update(k, v), (k, v), strict=True))
    assert not cache.has_every_key and cache.length == 4
    with pytest.raises(ValueError, match=r"must be empty for an update, .* 4 tokens"):
        cache.update(k, v)
    assert cache.length == 4


def test_what_is_no_cache_is_refused():
    with pytest.raises(TypeError, match=r"cache must have an update\(keys, values\), got list"):
        UpdatedCache([], LAYOUT)  # pyright: ignore[reportArgumentType]
    x = make_input()
    with pytest.raises(TypeError, match=r"cache must have an update\(keys, values\), got object"):
        make_layer()(x, cache=object())

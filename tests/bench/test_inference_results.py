import weakref

import pytest

from longshort.bench.benchmarking import Remark
from longshort.bench.inference_results import (
    Models,
    failures_told,
    groups_in_memory,
    median_ratio,
    run_rounds,
    suitable_providers,
    take_turns,
)
from longshort.bench.inference_settings import PrefillSettings

SETTINGS = PrefillSettings(preset="tiny", lengths=(32,), global_heads=2)
NEED = {"gpt2": 3, "ls": 2, "hybrid": 2, "mhsa": 4, "mistral": 1}


@pytest.mark.parametrize(
    ("together", "alone", "groups"),
    [
        (12, 12, [["gpt2", "ls", "hybrid", "mhsa", "mistral"]]),
        (11, 12, [["ls", "mhsa", "gpt2", "hybrid"], ["mistral"]]),
        (5, 6, [["ls", "mhsa"], ["gpt2", "hybrid"], ["mistral"]]),
        (5, 5, [["gpt2", "ls"], ["hybrid"], ["mhsa", "mistral"]]),
        (3, 3, [["gpt2"], ["ls"], ["hybrid", "mistral"]]),
        (0, 0, []),
    ],
    ids=str,
)
def test_who_is_in_memory_at_once(together, alone, groups):
    found = take_turns(NEED, lambda names: sum(NEED[name] for name in names), together, alone)
    assert found == groups


def test_what_does_not_fit_is_told():
    skipped: list[Remark] = []
    providers = suitable_providers(SETTINGS, "here", skipped)
    groups = groups_in_memory(
        providers, lambda names: 2**30 * sum(NEED[name] for name in names), (2**31, 2**31), "here", skipped
    )
    assert {name for group in groups for name in group} == {"ls", "hybrid", "mistral"}
    assert skipped == [
        Remark(name, "here", f"takes about {NEED[name]} GiB, 2 are allowed; see --max-memory-gib")
        for name in ("mhsa", "gpt2")
    ]


class FakeTurn:
    def __init__(self, turns, name, fails_at=-1):
        self.turns, self.name, self.fails_at = turns, name, fails_at

    def take_turn(self, counts):
        if len(self.turns) == self.fails_at:
            raise RuntimeError("no memory left\nat all")
        self.turns.append((self.name, counts))


def test_providers_take_turns_after_a_round_that_warms_up():
    turns: list[tuple[str, bool]] = []
    skipped: list[Remark] = []
    fakes = {"ls": FakeTurn(turns, "ls"), "mhsa": FakeTurn(turns, "mhsa"), "gpt2": FakeTurn(turns, "gpt2", 5)}
    failing = weakref.ref(fakes["gpt2"])
    run_rounds(fakes, 2, "here", skipped)
    assert list(fakes) == ["ls", "mhsa"]
    assert failing() is None  # nor what it keeps
    assert turns == [
        ("ls", False), ("mhsa", False), ("gpt2", False),
        ("ls", True), ("mhsa", True), ("ls", True), ("mhsa", True),
    ]  # fmt: skip
    assert skipped == [Remark("gpt2", "here", "failed: RuntimeError: no memory left")]


def test_models_are_kept_while_they_are_wanted():
    providers = suitable_providers(SETTINGS, "here", [])
    models = Models(SETTINGS)
    ls, mhsa = models.of(providers["ls"]), weakref.ref(models.of(providers["mhsa"]))
    models.keep(["gpt2", "ls"])
    assert mhsa() is None
    assert models.of(providers["ls"]) is ls


def test_only_failures_of_the_run_become_remarks():
    skipped: list[Remark] = []
    with failures_told(["ls", "mhsa"], "here", skipped):
        raise RuntimeError("no memory left")
    assert skipped == [Remark(n, "here", "failed: RuntimeError: no memory left") for n in ("ls", "mhsa")]
    with pytest.raises(ValueError, match="else"), failures_told(["ls"], "here", skipped):
        raise ValueError("else")


def test_ratios_are_paired_by_round():
    assert median_ratio([2.0, 9.0, 3.0], [1.0, 3.0, 3.0]) == 2
    assert median_ratio(None, [1.0]) is None

from __future__ import annotations

import math

import pytest

from longshort.studies.framework.study import Trial, unique
from longshort.studies.framework.sweep import RATES, Arm, Ladder, plan_arms, sweep

COARSE = Ladder((1e-3, 3e-3, 1e-2))
FINE = Ladder((0.0316, 0.1, 0.316), digits=3, extensions=4, loss="loss", floor=1e-7, tie=1e-3)
LADDERS = pytest.mark.parametrize("ladder", [COARSE, FINE], ids=["coarse", "fine"])


def trial(rate, seed):
    return Trial("arm", seed, {"rate": rate, "seed": seed}, work=3.0)


def arm_on(ladder, **changes):
    return Arm("arm", trial, ladder, **changes)


def results_of(ladder, losses, seed=0):
    return {trial(rate, seed).key: {ladder.loss: loss} for rate, loss in losses.items()}


def swept(ladder, loss_of):
    """The sweep, run to its end, if the loss at a rate is loss_of(rung), for the rate 10^(rung/2)."""
    results = {}
    while True:
        found = sweep(arm_on(ladder), results, 0)
        left = [t for t in found.trials if t.key not in results]
        if not left:
            return found
        for t in left:
            results[t.key] = {ladder.loss: loss_of(rung(t.settings["rate"]))}


def rung(rate):
    return round(2 * math.log10(rate))


def rungs(found):
    return [rung(rate) for rate in found.losses]


@LADDERS
def test_rates_are_half_powers_of_ten(ladder):
    above = ladder.neighbour(ladder.rates[-1], 1)
    assert ladder.neighbour(above, -1) == ladder.rates[-1]
    assert [ladder.neighbour(rate, 1) for rate in ladder.rates] == [*ladder.rates[1:], above]


@pytest.mark.parametrize(("ladder", "up", "down"), [(COARSE, 0.03, 3e-4), (FINE, 1.0, 0.01)])
def test_digits_of_rates(ladder, up, down):
    assert ladder.neighbour(ladder.rates[-1], 1) == up
    assert ladder.neighbour(ladder.rates[0], -1) == down
    assert FINE.neighbour(10.0, 1) == 31.6


@LADDERS
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_sweep_is_extended_until_its_best_rate_is_inside(ladder, shift):
    best = rung(ladder.rates[1]) + shift * ladder.extensions
    found = swept(ladder, lambda at: 1.0 + abs(at - best))
    assert found.is_done and not found.is_at_edge
    assert rung(found.best) == best
    assert rungs(found)[0] < best < rungs(found)[-1]
    assert [t.settings["rate"] for t in found.trials] == list(found.losses) == sorted(found.losses)


@LADDERS
@pytest.mark.parametrize(("at_first", "sign"), [(False, -1), (True, 1)])
def test_a_sweep_that_ends_at_an_edge_says_so(ladder, at_first, sign):
    found = swept(ladder, lambda at: 20.0 + sign * at)
    assert len(found.losses) == 3 + ladder.extensions
    assert found.is_done and found.is_at_edge
    assert found.best == list(found.losses)[0 if at_first else -1]


@pytest.mark.parametrize(("losses", "added"), [((2.0, 1.9, 1.8), 3e-2), ((1.8, 1.9, 2.0), 3e-4)])
def test_an_extended_sweep_is_not_done(losses, added):
    results = results_of(COARSE, dict(zip(COARSE.rates, losses, strict=True)))
    found = sweep(arm_on(COARSE), results, 0)
    assert not found.is_done
    assert added in found.losses


def test_a_single_rate_is_given():
    ladder = Ladder((1e-2,))
    found = sweep(arm_on(ladder), results_of(ladder, {1e-2: 2.0}), 0)
    assert (found.is_done, found.best, found.lower) == (True, 1e-2, 3e-3)


@LADDERS
def test_the_lower_rate_is_the_next_one_of_the_ladder(ladder):
    inside = sweep(
        arm_on(ladder), results_of(ladder, dict(zip(ladder.rates, (2.0, 1.9, 2.1), strict=True))), 0
    )
    assert (inside.best, inside.lower) == (ladder.rates[1], ladder.rates[0])
    assert [inside.rate(name) for name in RATES] == [inside.best, inside.lower]
    at_edge = swept(ladder, lambda at: 20.0 + at)
    assert at_edge.lower == ladder.neighbour(at_edge.best, -1) < min(at_edge.losses)


def test_of_losses_below_the_floor_the_lowest_rate_is_best():
    found = swept(FINE, lambda at: FINE.floor / 1000 * 2.0**-at if at > -5 else 1.0)
    assert rung(found.best) == -4


def test_of_losses_that_are_nearly_alike_the_lowest_rate_is_best():
    assert rung(swept(FINE, lambda at: {-3: 1.0005, -2: 1.0}.get(at, 2.0)).best) == -3
    assert rung(swept(FINE, lambda at: {-3: 1.002, -2: 1.0}.get(at, 2.0)).best) == -2


@LADDERS
def test_rates_that_diverge_are_not_best(ladder):
    middle = rung(ladder.rates[1])
    assert rung(swept(ladder, lambda at: None if at > middle else 10.0 - at).best) == middle
    lost = swept(ladder, lambda at: None)
    assert lost.is_at_edge and lost.best == min(lost.losses)


@LADDERS
def test_a_sweep_waits_for_all_its_rates(ladder):
    nothing = sweep(arm_on(ladder), {}, 0)
    assert not nothing.is_done
    known = sweep(arm_on(ladder), results_of(ladder, dict.fromkeys(ladder.rates[:2], 1.0)), 0)
    assert not known.is_done and known.trials == nothing.trials


def test_the_plan_holds_the_sweep_and_all_seeds_at_the_rates_that_are_asked_for():
    results = results_of(COARSE, {1e-3: 2.0, 3e-3: 1.9, 1e-2: 2.1})
    for count, expected in ((2, [3e-3, 1e-3]), (1, [3e-3])):
        trials = plan_arms([arm_on(COARSE)], range(3), results, RATES[:count]).trials
        assert [t.settings["rate"] for t in trials[:3]] == list(COARSE.rates)
        main = [(t.settings["rate"], t.seed) for t in trials[3:]]
        assert main == [(rate, seed) for rate in expected for seed in range(3)]
        assert len(unique(trials)) == 3 + 2 * len(expected)


def test_rates_may_come_from_the_sweep_of_another_arm():
    def elsewhere(rate, seed):
        return Trial("long", seed, {"rate": rate, "seed": seed, "length": 8})

    arm = Arm("long", elsewhere, COARSE, swept=arm_on(COARSE))
    results = results_of(COARSE, {1e-3: 2.0, 3e-3: 1.9, 1e-2: 2.1})
    trials = plan_arms([arm], range(2), results, ("best",)).trials
    assert [t.arm for t in trials] == ["arm"] * 3 + ["long"] * 2
    assert {t.settings["rate"] for t in trials[3:]} == {3e-3}


@LADDERS
def test_the_work_that_is_left_is_known_before_the_sweeps_are_done(ladder):
    arms = [arm_on(ladder)]
    before = plan_arms(arms, range(3), {})
    results = results_of(ladder, dict(zip(ladder.rates, (2.0, 1.9, 2.1), strict=True)))
    after = plan_arms(arms, range(3), results)
    assert after.later_work == 0
    assert sum(t.work for t in before.trials) + before.later_work == pytest.approx(
        sum(t.work for t in unique(after.trials))
    )


def test_repeated_trials_keep_their_first_or_last_place():
    first, second = trial(1.0, 0), trial(2.0, 0)
    assert unique([first, second, first]) == [second, first]
    assert unique([first, second, first], keep="first") == [first, second]

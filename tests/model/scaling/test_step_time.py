"""The model of time: by hand on round numbers, and how it must change with what it depends on."""

import math
from dataclasses import replace
from typing import Any

import pytest

from longshort.distributed import plan_context
from longshort.model import preset, training_flops
from longshort.model.scaling import (
    Rates,
    TrainingSetup,
    compare_training,
    fewest_context_ranks,
    step_flops,
    step_time,
    step_traffic,
)

BASE = TrainingSetup(preset("paper-base"), 8192, 64, 64)
ROUND = Rates(
    peak_tflops=1.0, matrix_share=0.5, attention_share=0.25, local_share=0.125, node_bandwidth=1.0,
    network_bandwidth=0.5, gpus_per_node=4, latency=0.0, overlap=0.0,
)  # fmt: skip


@pytest.mark.parametrize("mhsa", [False, True])
def test_operations_are_those_of_costs(mhsa: bool) -> None:
    config = preset("tiny", mhsa=mhsa, sink_tokens=2)
    setup = TrainingSetup(config, 100, 6, 2)
    flops, counted = step_flops(setup), training_flops(config, 100).times(6)
    assert flops.matrices == counted.matrices and flops.lm_head == counted.lm_head
    assert flops.global_attention + flops.local_attention == counted.attention
    assert flops.total == counted.total and flops.recomputed == 0
    assert (flops.local_attention == 0) == mhsa
    again = step_flops(replace(setup, checkpointing=True))
    assert again.recomputed == (counted.matrices + counted.attention) // 3 and again.total == flops.total


def test_computing_by_hand() -> None:
    setup = TrainingSetup(preset("tiny"), 100, 6, 2)
    flops, time = step_flops(setup), step_time(setup, ROUND)
    assert time.matrices == pytest.approx((flops.matrices + flops.lm_head) / 2 / 0.5e12)
    assert time.global_attention == pytest.approx(flops.global_attention / 2 / 0.25e12)
    assert time.local_attention == pytest.approx(flops.local_attention / 2 / 0.125e12)
    assert time.compute == time.matrices + time.global_attention + time.local_attention
    assert time.total == time.compute + time.exposed_keys + time.exposed_weights
    assert time.tokens_per_second == 600 / time.total
    again = step_time(replace(setup, checkpointing=True), ROUND)
    assert again.global_attention == pytest.approx(4 / 3 * time.global_attention)
    assert again.matrices < 4 / 3 * time.matrices  # the logits are not computed again


@pytest.mark.parametrize(
    ("ranks", "seconds_per_byte"),
    [(4, 1e-9), (8, 8 / 7 / 2 / 4 / 0.5e9), (6, 1e-9)],
    ids=["one node", "two nodes", "one and a half"],
)
def test_weights_by_hand(ranks: int, seconds_per_byte: float) -> None:
    """In a node at its bandwidth; between nodes over as many links as a node has, if that takes longer."""
    setup = TrainingSetup(preset("tiny"), 64, ranks, ranks)
    traffic = step_traffic(setup)
    sent = traffic.weights + traffic.scattered
    assert step_time(setup, ROUND).weights == pytest.approx(sent * max(1e-9, seconds_per_byte))
    slow = replace(ROUND, network_bandwidth=0.01)
    if ranks == 8:
        assert step_time(setup, slow).weights == pytest.approx(sent * 8 / 7 / 2 / 4 / 0.01e9)


def test_keys_by_hand() -> None:
    config = preset("tiny", num_global_heads=4)
    inside = TrainingSetup(config, 512, 2, 4, context_parallel=4, exchange="ring")
    sent = step_traffic(inside).keys.total
    assert step_time(inside, ROUND).keys == pytest.approx(sent / 1e9)
    across = replace(inside, ranks=8, context_parallel=8)
    assert step_time(across, ROUND).keys == pytest.approx(step_traffic(across).keys.total / 0.5e9)
    late = replace(ROUND, latency=10.0)
    messages = 2 * 2 * 3  # layers, passes, rounds of the ring
    assert step_time(inside, late).keys == pytest.approx(sent / 1e9 + messages * 10e-6)
    assert step_time(replace(inside, context_parallel=1, batch=4), ROUND).keys == 0


def test_transfers_hide_behind_computing() -> None:
    setup = TrainingSetup(preset("tiny"), 512, 2, 8, context_parallel=4)
    none = step_time(setup, ROUND)
    assert none.exposed_keys == none.keys and none.exposed_weights == none.weights
    some = step_time(setup, replace(ROUND, overlap=0.5))
    attention = none.global_attention + none.local_attention
    assert some.exposed_keys == pytest.approx(max(0, none.keys - attention / 2))
    assert some.exposed_weights == pytest.approx(max(0, none.weights - none.matrices / 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("peak_tflops", 500.0), ("matrix_share", 0.2), ("attention_share", 0.2), ("local_share", 0.05),
     ("node_bandwidth", 50.0), ("network_bandwidth", 5.0), ("latency", 100.0), ("overlap", 0.0)],
)  # fmt: skip
def test_worse_rates_take_longer(name: str, value: float) -> None:
    setup = TrainingSetup(preset("paper-base"), 8192, 64, 512, context_parallel=16)
    rates = Rates(node_bandwidth=100.0)
    assert step_time(setup, replace(rates, **{name: value})).total > step_time(setup, rates).total


def test_more_gpus_compute_less_each_and_the_step_is_not_longer() -> None:
    times = [step_time(replace(BASE, ranks=ranks), Rates(latency=0.0)) for ranks in (8, 16, 32, 64)]
    assert [time.compute for time in times] == sorted((time.compute for time in times), reverse=True)
    assert times[0].compute == pytest.approx(8 * times[-1].compute)
    assert [time.total for time in times] == sorted((time.total for time in times), reverse=True)


def test_mhsa_computes_and_sends_more() -> None:
    plans = compare_training(replace(BASE, ranks=256, context_parallel=4), Rates())
    assert [plan.name for plan in plans] == ["LS-attention", "MHSA, all-gather", "MHSA, ring"]
    ours, gathered, ring = plans
    assert ours.parameters == gathered.parameters == ring.parameters
    assert ours.time.compute < gathered.time.compute == ring.time.compute
    assert ours.traffic.keys.total < gathered.traffic.keys.total < ring.traffic.keys.total
    assert ours.traffic.weights == gathered.traffic.weights
    assert ours.imbalance == pytest.approx(1, abs=0.05) and gathered.imbalance == 1
    whole = compare_training(BASE, Rates())
    assert [plan.name for plan in whole] == ["LS-attention", "MHSA"]
    assert whole[0].memory == whole[1].memory


def test_the_fewest_ranks_that_share_a_sequence() -> None:
    for batch, ranks in ((64, 8), (64, 256), (1, 8), (3, 8), (12, 8), (7, 7)):
        shared = fewest_context_ranks(batch, ranks)
        allowed = [c for c in range(1, ranks + 1) if ranks % c == 0 and batch % (ranks // c) == 0]
        assert shared == min(allowed)


def rates(name: str, value: Any) -> Rates:
    return Rates(**{name: value})


def refused(message: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **changes)


def test_bad_setups_are_named() -> None:
    for name in ("length", "batch", "ranks", "context_parallel", "micro_batch", "shards"):
        for value in (0, -1, 1.5, True):
            refused(f"^{name} must be an integer >= 1, got {value}", **{name: value})
    refused("^context_parallel must divide the 64 ranks, got 3", context_parallel=3)
    refused("^batch must be a multiple of 64 = ranks / context_parallel, .*got 63", batch=63)
    refused("^shards must divide the 64 ranks, got 5", shards=5)
    refused("^shards goes only with parallel fsdp, got 4 with ddp", shards=4, parallel="ddp")
    refused("^parallel must be one of fsdp, ddp, got 'tp'", parallel="tp")
    refused("^precision must be one of bf16, fp32, got 'fp8'", precision="fp8")
    refused("^exchange must be one of long-short, all-gather, ring, got 'none'", exchange="none")
    refused("^length must be at most max_position_embeddings = 8192 .*got 8193", length=8193)
    convolved = preset("paper-base", short_convolution=3)
    refused("^context_parallel must be 1 with short_convolution, got 2", config=convolved, context_parallel=2)
    sinks = preset("paper-base", position_embedding="alibi", sink_tokens=2)
    refused("^context_parallel must be 1 with ALiBi and sink tokens, got 2", config=sinks, context_parallel=2)
    with pytest.raises(TypeError, match=r"^config must be a LongShortConfig, got str"):
        replace(BASE, config="paper-base")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["peak_tflops", "matrix_share", "attention_share", "local_share",
                                  "node_bandwidth", "network_bandwidth", "gpus_per_node"])  # fmt: skip
def test_rates_that_are_not_positive_are_refused(name: str) -> None:
    for value in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^{name} must be .* got"):
            rates(name, value)


def test_rates_beyond_their_range_are_refused() -> None:
    for name in ("matrix_share", "attention_share", "local_share", "overlap"):
        with pytest.raises(ValueError, match=f"^{name} must be at most 1, got 1.5"):
            rates(name, 1.5)
    for name in ("latency", "overlap"):
        with pytest.raises(ValueError, match=f"^{name} must be a finite number .*got -1"):
            rates(name, -1)
        rates(name, 0.0)


def test_the_slowest_rank_counts() -> None:
    setup = TrainingSetup(preset("tiny"), 100, 1, 8, context_parallel=8)
    uneven = plan_context(8, 104).imbalance
    assert uneven > 1
    flops, time = step_flops(setup), step_time(setup, ROUND)
    assert time.global_attention == pytest.approx(uneven * flops.global_attention / 8 / 0.25e12)
    assert time.local_attention == pytest.approx(flops.local_attention / 8 / 0.125e12)

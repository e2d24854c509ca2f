"""The bytes that are sent, against the collectives of real steps and against counts by hand."""

from dataclasses import replace
from typing import Any

import pytest
from tests.model.scaling.test_memory import measured, setup_of

from longshort.distributed import all_gather_bytes, plan_context
from longshort.distributed import layer_traffic as layer_bytes
from longshort.model import preset
from longshort.model.scaling import TrainingSetup, Weights, layer_traffic, step_traffic
from longshort.model.scaling.keys import KeyTraffic

GATHER, SCATTER = "c10d._allgather_base_.default", "c10d._reduce_scatter_base_.default"


@pytest.mark.parametrize("again", [False, True])
def test_weights_travel_as_fsdp_sends_them(again: bool) -> None:
    setup = setup_of({"num_hidden_layers": 5}, 8, batch=4, ranks=4, checkpointing=again)
    live = measured(setup)
    traffic = step_traffic(setup)
    assert traffic.weights == 4 * 3 / 4 * sum(live.sizes[GATHER])
    assert traffic.scattered == 4 * 3 / 4 * sum(live.sizes[SCATTER])
    assert traffic.reduced == traffic.keys.total == 0
    assert len(live.sizes[GATHER]) == 2 * 5 + 1 and len(live.sizes[SCATTER]) == 5 + 1


def test_micro_batches_gather_anew_and_scatter_once() -> None:
    setup = TrainingSetup(preset("tiny"), 64, 16, 4)
    one, four = step_traffic(setup), step_traffic(replace(setup, micro_batch=1))
    assert replace(setup, micro_batch=1).micro_batches == 4
    assert four.weights == 4 * one.weights and four.scattered == one.scattered


def test_copies_of_weights_reduce_their_gradients() -> None:
    setup = TrainingSetup(preset("tiny"), 64, 16, 8)
    weights = Weights.of(setup.config)
    ddp = step_traffic(replace(setup, parallel="ddp"))
    assert (ddp.weights, ddp.scattered) == (0, 0)
    assert ddp.reduced == 2 * 4 * weights.count * 7 / 8
    hybrid = step_traffic(replace(setup, shards=2))
    assert hybrid.scattered == 4 * weights.gathered(2) / 2
    assert hybrid.reduced == 2 * 4 * weights.in_shard(2) * 3 / 4
    assert step_traffic(replace(setup, ranks=1)).total == 0


def cut(**options: Any) -> TrainingSetup:
    config = preset("tiny", num_global_heads=[1, 2], local_window=[5, 100], sink_tokens=3, head_dim=8)
    return TrainingSetup(config, 200, 6, 8, context_parallel=4, **options)


def test_keys_are_those_of_the_plan_for_each_layer() -> None:
    setup = cut()
    rows = plan_context(4, 200).lent_rows
    first, second = (
        layer_bytes(layout, 8, 2, 200, 4, lent_rows=rows) for layout in setup.config.head_layouts()
    )
    layer, step = layer_traffic(setup), step_traffic(setup).keys
    for kind in ("halo", "sinks", "gather", "lent"):
        total = getattr(first, kind) + getattr(second, kind)
        assert getattr(layer, kind) == pytest.approx(total / 2)
        assert getattr(step, kind) == pytest.approx(2 * 3 * total)  # both passes; 3 sequences a row
    assert layer.ring == 0 and layer.sinks > 0 and layer.lent > 0
    fp32 = replace(setup, precision="fp32")
    assert layer_traffic(fp32).total == pytest.approx(2 * layer.total)


def test_baselines_send_all_heads() -> None:
    gathered, ring = cut(exchange="all-gather"), cut(exchange="ring")
    expected = all_gather_bytes(gathered.config.head_layouts()[0], 8, 2, 200, 4)
    assert layer_traffic(gathered) == KeyTraffic(gather=expected)
    assert layer_traffic(ring) == KeyTraffic(ring=expected)
    assert step_traffic(gathered).keys.total == 2 * 2 * 3 * expected
    assert step_traffic(ring).keys.total == 3 * 2 * 3 * expected  # gradients go round too


def test_one_of_twelve_global_heads_sends_less_than_a_tenth() -> None:
    setup = TrainingSetup(preset("paper-base", max_position_embeddings=16_384), 16_384, 1, 4, 4)
    ours, gathered = layer_traffic(setup), layer_traffic(replace(setup, exchange="all-gather"))
    assert ours.total < gathered.total / 10


def test_whole_sequences_send_no_keys() -> None:
    for exchange in ("long-short", "all-gather", "ring"):
        assert step_traffic(replace(cut(), context_parallel=1, batch=8, exchange=exchange)).keys.total == 0

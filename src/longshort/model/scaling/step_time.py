"""A model of the time of a training step on many GPUs: assumed rates, nothing measured.

    compute  = sum of operations / (peak · share of it), forward once and backward twice; with checkpointing
               the blocks' forward pass once more; that of global heads times the imbalance of the ranks
    transfer = messages · latency + bytes / bandwidth
    step     = compute + what of each transfer is longer than what it may hide behind:
               keys behind `overlap` · attention, weights and gradients behind `overlap` · matrices

The bandwidth of a transfer within a node is that between its GPUs. Between nodes it is that of the network,
of which every GPU has a link of its own; an all-gather or reduce-scatter over N nodes then needs only 1/g of
its bytes on each of the g links of a node (that is how rings over several links work). Not counted are AdamW,
norms and activations, the reading of data, and ranks that wait for one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from longshort.checks import require_integer, require_positive
from longshort.layout import HeadLayout
from longshort.model.costs import forward_flops
from longshort.model.scaling.keys import imbalance, key_traffic
from longshort.model.scaling.setup import TrainingSetup
from longshort.model.scaling.traffic import StepTraffic, step_traffic


@dataclass(frozen=True)
class Rates:
    """What a GPU and its links are taken to do. None of the defaults was measured here.

    Attributes:
        peak_tflops: 10^12 operations per second of one GPU. The default is the published one of an H100 (SXM)
            in bf16, dense.
        matrix_share: part of the peak that products of matrices reach, the logits' included.
        attention_share: part of it that attention of global heads reaches, per counted operation: a backward
            pass that computes the scores anew does 7 products where 5 are counted.
        local_share: the same of local heads, which memory bounds.
        node_bandwidth: 10^9 bytes per second that one GPU sends to others of its node.
        network_bandwidth: the same to GPUs of other nodes.
        gpus_per_node: GPUs of a node.
        latency: 10^-6 seconds before the first byte of a message.
        overlap: part of the time of computing behind which transfers may hide, 0 ... 1.

    Raises:
        ValueError: an attribute is out of its range; the message begins with its name.
    """

    peak_tflops: float = 989.4
    matrix_share: float = 0.5
    attention_share: float = 0.35
    local_share: float = 0.1
    node_bandwidth: float = 350.0
    network_bandwidth: float = 40.0
    gpus_per_node: int = 8
    latency: float = 20.0
    overlap: float = 0.7

    def __post_init__(self) -> None:
        for name in ("peak_tflops", "node_bandwidth", "network_bandwidth"):
            require_positive(name, getattr(self, name))
        for name in ("matrix_share", "attention_share", "local_share"):
            require_positive(name, getattr(self, name))
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}")
        for name in ("latency", "overlap"):
            if getattr(self, name) != 0:
                require_positive(name, getattr(self, name))
        if self.overlap > 1:
            raise ValueError(f"overlap must be at most 1, got {self.overlap}")
        require_integer("gpus_per_node", self.gpus_per_node, minimum=1)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on the GPU that is slowest.

    Attributes:
        matrices: projections, MLPs and logits.
        global_attention: attention of global heads.
        local_attention: attention of local heads.
        keys: transfers of attention, as if nothing else were done.
        weights: transfers of weights and gradients, as if nothing else were done.
        exposed_keys: what of `keys` nothing hides.
        exposed_weights: what of `weights` nothing hides.
        tokens: tokens of the step, over all GPUs.
    """

    matrices: float
    global_attention: float
    local_attention: float
    keys: float
    weights: float
    exposed_keys: float
    exposed_weights: float
    tokens: int

    @property
    def compute(self) -> float:
        """Seconds of computing."""
        return self.matrices + self.global_attention + self.local_attention

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed_keys + self.exposed_weights

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs."""
        return self.tokens / self.total


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step over all GPUs, as `training_flops` counts them.

    Attributes:
        matrices: the blocks' projections and MLPs.
        global_attention: attention of global heads.
        local_attention: attention of local heads.
        lm_head: the logits.
        recomputed: what checkpointing repeats, which is no progress.
    """

    matrices: int
    global_attention: int
    local_attention: int
    lm_head: int
    recomputed: int

    @property
    def total(self) -> int:
        """The sum of all but what is recomputed."""
        return self.matrices + self.global_attention + self.local_attention + self.lm_head


def step_flops(setup: TrainingSetup) -> StepFlops:
    """Count the operations of a step, each sequence one document."""
    config = setup.config
    forward = forward_flops(config, setup.length)
    of_local = 4 * config.head_dim * sum(_local_pairs(one, setup.length) for one in config.head_layouts())
    blocks = forward.matrices + forward.attention
    return StepFlops(
        matrices=3 * setup.batch * forward.matrices,
        global_attention=3 * setup.batch * (forward.attention - of_local),
        local_attention=3 * setup.batch * of_local,
        lm_head=3 * setup.batch * forward.lm_head,
        recomputed=setup.batch * blocks if setup.checkpointing else 0,
    )


def step_time(setup: TrainingSetup, rates: Rates, traffic: StepTraffic | None = None) -> StepTime:
    """Model the time of a step.

    Args:
        setup: the model, the batch and the GPUs.
        rates: what they are taken to do.
        traffic: `step_traffic(setup)`, if it is known already.
    """
    traffic = traffic or step_traffic(setup)
    flops = step_flops(setup)
    repeated = 4 / 3 if setup.checkpointing else 1
    speed = setup.ranks * rates.peak_tflops * 1e12
    matrices = (repeated * flops.matrices + flops.lm_head) / (speed * rates.matrix_share)
    far = repeated * flops.global_attention / (speed * rates.attention_share) * imbalance(setup)
    near = repeated * flops.local_attention / (speed * rates.local_share)
    keys, weights = _keys_seconds(setup, rates), _weights_seconds(setup, rates, traffic)
    return StepTime(
        matrices=matrices,
        global_attention=far,
        local_attention=near,
        keys=keys,
        weights=weights,
        exposed_keys=max(0.0, keys - rates.overlap * (far + near)),
        exposed_weights=max(0.0, weights - rates.overlap * matrices),
        tokens=setup.batch * setup.length,
    )


def _local_pairs(layout: HeadLayout, length: int) -> int:
    windows = tuple(window for window in layout.windows if window is not None)
    return HeadLayout(windows, sink_tokens=layout.sink_tokens).score_count(length, length) if windows else 0


def _keys_seconds(setup: TrainingSetup, rates: Rates) -> float:
    """The transfers of attention over all layers and sequences, forward and backward."""
    ranks, seconds = setup.context_parallel, 0.0
    if ranks == 1:
        return seconds
    point_to_point = _bandwidth(ranks, rates)
    for layout in setup.config.head_layouts():
        for backward in (False, True):
            one = key_traffic(setup, layout, backward=backward)
            # halo, sinks and lent queries share a message; the outputs of lent queries come back in another
            messages = (1 if one.halo or one.lent else 0) + (1 if one.lent else 0) + (1 if one.gather else 0)
            messages += ranks - 1 if one.ring else 0
            straight = (one.halo + one.sinks + one.lent + one.ring) / point_to_point
            gathered = _collective_seconds(one.gather, ranks, rates)
            seconds += setup.sequences * (straight + gathered)
            seconds += setup.micro_batches * messages * rates.latency * 1e-6
    return seconds


def _weights_seconds(setup: TrainingSetup, rates: Rates, traffic: StepTraffic) -> float:
    """The all-gathers of weights, and the exchange of gradients."""
    groups, shards = setup.config.num_hidden_layers + 1, setup.shard_count
    copies, seconds = setup.ranks // shards, 0.0
    if shards > 1:
        messages = setup.micro_batches * (2 * groups - 1) + groups
        seconds += messages * rates.latency * 1e-6
        seconds += _collective_seconds(traffic.weights + traffic.scattered, shards, rates)
    if copies > 1:
        seconds += groups * rates.latency * 1e-6
        if shards == 1:
            return seconds + _collective_seconds(traffic.reduced, copies, rates)
        seconds += traffic.reduced / _bandwidth(setup.ranks, rates)  # each with those of its number elsewhere
    return seconds


def _bandwidth(ranks: int, rates: Rates) -> float:
    """Bytes per second from one of `ranks` neighbours to another, over the slowest link between them."""
    is_inside = _nodes(ranks, rates) == 1
    return 1e9 * (rates.node_bandwidth if is_inside else rates.network_bandwidth)


def _collective_seconds(sent: float, ranks: int, rates: Rates) -> float:
    """Seconds of an all-gather or reduce-scatter in which each of `ranks` neighbours sends so many bytes."""
    nodes = _nodes(ranks, rates)
    inside = sent / (1e9 * rates.node_bandwidth)
    if nodes == 1:
        return inside
    links = min(ranks, rates.gpus_per_node)
    whole = sent * ranks / (ranks - 1)
    return max(inside, whole * (nodes - 1) / nodes / links / (1e9 * rates.network_bandwidth))


def _nodes(ranks: int, rates: Rates) -> int:
    """The nodes over which neighbours spread; groups whose size does not divide a node's lie across two."""
    per_node = rates.gpus_per_node
    if ranks <= per_node:
        return 1 if per_node % ranks == 0 else 2
    return ceil(ranks / per_node)

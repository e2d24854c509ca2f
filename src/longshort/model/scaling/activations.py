"""What a training step keeps for its backward pass, and needs beside that, counted from the model's code.

All functions count bytes of one block, or of what comes behind the blocks, on one rank for the sequences of
one forward pass. The residual stream, norms and the loss are in fp32; e stands for the products' dtype.
"""

from __future__ import annotations

from longshort.layout import HeadLayout
from longshort.model.config import LongShortConfig
from longshort.model.scaling.keys import borrowed_rows, context_plan
from longshort.model.scaling.setup import TrainingSetup

_FP32 = 4
_GRADIENTS_OF_GATHERED = 2  # their sum over calls, and a copy on its way back


def boundary_bytes(setup: TrainingSetup) -> int:
    """Count the input of a block, which is all that checkpointing keeps of it."""
    return setup.tokens_at_once * setup.config.hidden_size * _FP32


def block_bytes(setup: TrainingSetup) -> int:
    """Count what autograd keeps of one block, but for what `cut_bytes` counts.

    In fp32 are the inputs of both norms, with mean and deviation, and the maximum and the sum of each row of
    attention. In the products' dtype are the inputs of the four matrices and of GELU, and queries, keys,
    values and outputs: each once, since they are parts of one product and the input of another. If rotation,
    norms of queries and keys, or a cast come between, those before them are others than those behind; where
    sequences are cut, only those queries are kept, as keys and values are copied once more.
    """
    config, e = setup.config, setup.element_size
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    own, shared, qkv = heads * width, kv_heads * width, (heads + 2 * kv_heads) * width
    kept = 2 * (_FP32 * config.hidden_size + 2 * _FP32)
    kept += e * (2 * config.hidden_size + 2 * config.intermediate_size)
    if setup.attention_size != e:
        kept += setup.attention_size * (qkv + own) + e * own
    else:
        kept += e * (qkv + own + (own + shared + own if _is_changed(config) else 0))
    kept += 2 * _FP32 * heads
    if config.qk_norm:
        kept += 2 * _FP32 * (heads + kv_heads)
    if config.short_convolution is not None:
        kept += e * qkv
    if setup.context_parallel > 1 and setup.exchange != "ring":
        if setup.attention_size != e:
            kept -= setup.attention_size * 2 * shared
        elif _is_changed(config):
            kept -= e * (qkv + shared)
    angles = setup.part * _FP32 * width if _is_rotated(config) else 0  # of one sequence; all share them
    return setup.tokens_at_once * kept + angles


def cut_bytes(setup: TrainingSetup, layout: HeadLayout, *, arrived_only: bool) -> int:
    """Count what is kept of one block besides because sequences are cut.

    Keys and values of local heads are joined with those before the part, and of global heads they are put in
    the order of the sequence, of which what arrived is kept with checkpointing; borrowed queries and their
    outputs are kept, and the outputs of all heads once more, joined. Of an all-gather of all heads its result
    is taken to be kept, of a ring nothing.

    Args:
        setup: the model, the batch and the GPUs.
        layout: the layout of the block.
        arrived_only: count what exchanges brought alone, which checkpointing keeps.
    """
    config, e, row = setup.config, setup.element_size, _row_bytes(setup)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if setup.context_parallel == 1 or setup.exchange == "ring":
        return 0
    if setup.exchange == "all-gather":
        return _gathered_bytes(setup, kv_heads)
    kept = 2 * len(layout.global_heads) * borrowed_rows(context_plan(setup)) * row
    for group in layout.groups:
        if group.window is None:
            kept += _gathered_bytes(setup, len(group.kv_heads))
            continue
        before = min((setup.context_parallel - 1) * setup.part, group.window - 1 + layout.sink_tokens)
        kept += 2 * len(group.kv_heads) * (before if arrived_only else 2 * before + setup.part) * row
    joined = setup.attention_size == e and not _is_changed(config)
    return kept + (heads * setup.part * row if joined and not arrived_only else 0)


def block_backward_bytes(setup: TrainingSetup, layout: HeadLayout) -> int:
    """Count what the backward pass of a block needs beside what is kept, where that is most: in the MLP the
    gradients of the residual stream and of the last matrix's input and output; or in attention, when what the
    MLP kept is free again, those of queries, keys, values, outputs and gathered keys and values."""
    config, e, tokens = setup.config, setup.element_size, setup.tokens_at_once
    cast = 0 if e == _FP32 else e
    stream = (_FP32 + cast) * config.hidden_size
    mlp = tokens * (stream + e * config.intermediate_size)
    numbers = (3 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    freed = e * (2 * config.intermediate_size + config.hidden_size)
    attention = tokens * (stream + setup.attention_size * numbers - freed)
    if setup.context_parallel > 1 and setup.exchange != "ring":
        copies = _GRADIENTS_OF_GATHERED if setup.exchange == "long-short" else 1
        kv_heads = len(layout.global_heads) // layout.group_size
        attention += copies * _gathered_bytes(setup, kv_heads)
    return max(mlp, attention)


def head_bytes(setup: TrainingSetup) -> int:
    """Count what is kept behind the blocks: the input of the last norm with its mean and deviation, that of
    the head, the logarithms of the probabilities in fp32, and the labels."""
    config = setup.config
    numbers = _FP32 * (config.hidden_size + 2 + config.vocab_size) + setup.element_size * config.hidden_size
    return setup.tokens_at_once * (numbers + 8)


def loss_bytes(setup: TrainingSetup) -> int:
    """Count what the loss needs beside what is kept: backward two gradients of the size of the logits in
    fp32; or forward the logits, in the products' dtype and in fp32, and the last norm's output."""
    config, e = setup.config, setup.element_size
    copied = e * config.vocab_size + _FP32 * config.hidden_size if e != _FP32 else 0
    return setup.tokens_at_once * max(_FP32 * config.vocab_size + copied, 2 * _FP32 * config.vocab_size)


def _is_changed(config: LongShortConfig) -> bool:
    return config.qk_norm or _is_rotated(config)


def _is_rotated(config: LongShortConfig) -> bool:
    return "rope" in (config.position_embedding, config.global_position_embedding)


def _row_bytes(setup: TrainingSetup) -> int:
    """The bytes of one query, key or value, of all sequences at once."""
    return setup.sequences_at_once * setup.config.head_dim * setup.attention_size


def _gathered_bytes(setup: TrainingSetup, kv_heads: int) -> int:
    """The bytes of all keys and values of some heads."""
    return 2 * kv_heads * setup.context_parallel * setup.part * _row_bytes(setup)

"""FlexAttention against the definition, on the CPU, where it has no backward pass.

Most calls run its unfused implementation, which needs no compilation.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.attention_cases import (
    Case,
    assert_result_as_good_as_plain,
    gradients_of,
    leaves_of,
    plain,
    random_case,
    visibility,
)
from torch.nn.attention import flex_attention as torch_flex

from longshort import HeadLayout, attention, explain
from longshort.attention import BACKENDS, check_call
from longshort.backends import flex

CPU = torch.device("cpu")
LAYOUTS = [
    HeadLayout.split(4, 1, 9),
    HeadLayout.split(4, 0, 129),
    HeadLayout.split(4, 4, 9),
    HeadLayout.split(4, 0, 1000, sink_tokens=3),
    HeadLayout((1, 1, 128, 128, None, None, 257, 257), num_kv_heads=4, sink_tokens=130),
    HeadLayout((127, None, 128), sink_tokens=128),
]
LENGTHS = [(1, 1), (64, 64), (300, 300), (384, 384), (1, 513), (100, 390)]


@pytest.fixture
def unfused(monkeypatch):
    """Run FlexAttention without compiling it."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compile", lambda: torch_flex.flex_attention)


def call_of(case: Case, **changes: Any):
    options = {name: value for name, value in case.options.items() if name != "sink_logits"}
    call, _, _ = check_call(case.q, case.k, case.v, case.layout, backend="reference", **options)
    return replace(call, **changes)


def listed(counts: torch.Tensor, indices: torch.Tensor) -> list[list[list[int]]]:
    """The columns of each row of blocks, by head."""
    return [
        [row[:count].tolist() for row, count in zip(rows, numbers.tolist(), strict=True)]
        for rows, numbers in zip(indices[0], counts[0], strict=True)
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_the_block_mask_is_that_of_torch(layout: HeadLayout, lengths: tuple[int, int], causal: bool):
    ours = flex.block_mask(layout, *lengths, causal, False, CPU)
    theirs = torch_flex.create_block_mask(ours.mask_mod, None, layout.num_heads, *lengths, device="cpu")
    assert ours.shape[-2:] == theirs.shape[-2:]
    for counts, indices in (
        ("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices"),
    ):  # fmt: skip
        found = listed(getattr(ours, counts), getattr(ours, indices))
        assert found == listed(getattr(theirs, counts), getattr(theirs, indices))


@pytest.mark.parametrize("seed", range(40))
def test_every_visible_pair_is_in_a_block_and_seen(seed: int):
    case = random_case(seed, max_length=300)
    call = call_of(case)
    masks = []

    def spy(q: torch.Tensor, *_args: Any, block_mask: torch_flex.BlockMask, **_options: Any) -> torch.Tensor:
        masks.append(block_mask)
        return torch.zeros_like(q)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flex, "_compile", lambda: spy)
        flex.attend(call)
    mask, seen = masks[0], visibility(case)
    batch, heads, q_len, kv_len = seen.shape
    index = [torch.arange(size) for size in seen.shape]
    pairs = mask.mask_mod(
        index[0].view(-1, 1, 1, 1), index[1].view(-1, 1, 1), index[2].view(-1, 1), index[3]
    ).expand_as(seen)
    taken = torch.zeros_like(seen)
    whole = torch.zeros_like(seen)
    for marked, counts, indices in (
        (taken, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for head, rows in enumerate(listed(counts, indices)):
            for row, columns in enumerate(rows):
                for column in columns:
                    part = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                    marked[:, head, *part] = True
    assert not (taken & whole).any()
    assert ((taken & pairs) | whole).equal(seen)
    assert (batch, heads, q_len, kv_len) == (*call.q.shape[:3], call.k.shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20))
def test_random_calls(unfused: None, seed: int, dtype: torch.dtype):
    case = random_case(seed).cast(dtype)
    case.options.pop("sink_logits", None)
    found = flex.attend(call_of(case, with_lse=True))
    assert found.lse is not None
    assert found.out.dtype == found.lse.dtype == torch.float32
    visible = visibility(case)
    hidden = ~visible.any(-1)
    assert found.out[hidden].eq(0).all()
    assert found.lse[hidden].eq(-torch.inf).all()
    truth = plain(case.cast(torch.float64), visible)
    assert_result_as_good_as_plain(replace(truth, out=found.out, lse=found.lse, gradients=[]), case)


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_random_calls(monkeypatch, seed: int):
    """FlexAttention computes without its kernels, which it does not offer on a CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_tensors: None)
    options: dict[str, Any] = {"backend": "aot_eager", "dynamic": False, "fullgraph": True}
    monkeypatch.setattr(flex, "_compile", lambda: torch.compile(torch_flex.flex_attention, **options))
    case = random_case(seed, max_length=70).cast(torch.float32)
    case.options.pop("sink_logits", None)
    leaves = leaves_of(case)
    q, k, v = leaves
    found = flex.attend(call_of(case, q=q, k=k, v=v, with_lse=True))
    assert found.lse is not None
    gradients = gradients_of(case, found.out, found.lse, leaves)
    truth = plain(case.cast(torch.float64), visibility(case))
    out, lse = found.out.detach(), found.lse.detach()
    assert_result_as_good_as_plain(replace(truth, out=out, lse=lse, gradients=gradients), case)


@pytest.mark.slow
def test_compiled_calls():
    """Each size is compiled, which takes long."""
    options: dict[str, Any] = {
        "softcap": 3.0, "alibi_slopes": torch.rand(4), "scale": 0.3,
        "segment_ids": torch.randint(-1, 2, (2, 150)),
    }  # fmt: skip
    layout = HeadLayout((9, 9, None, None), num_kv_heads=2, sink_tokens=2)
    q, k, v = torch.randn(2, 4, 130, 16), *torch.randn(2, 2, 2, 150, 16)
    for given in ({}, options):
        expected = attention(q, k, v, layout, backend="reference", **given)
        torch.testing.assert_close(attention(q, k, v, layout, backend="flex", **given), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "q is torch.float64; FlexAttention computes"),
        ({"round_probabilities": True}, "rounds probabilities in a way of its own"),
        ({"return_stats": True}, "has no entropy"),
        ({"sink_logits": torch.zeros(2)}, "compiled for a CPU returns no lse"),
        ({"requires_grad": True}, "no backward pass on a CPU"),
        ({"device": "meta"}, "the tensors are on meta, not on a CPU or GPU"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], reason: str):
    tensors = {name: changes.pop(name) for name in ("dtype", "device", "requires_grad") if name in changes}
    q, k, v = (torch.zeros(1, 2, 8, 16, **tensors) for _ in range(3))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=f"backend 'flex' cannot serve this call: .*{reason}"),
    ):
        attention(q, k, v, HeadLayout((2, None)), backend="flex", **changes)


def test_tangents_transforms_and_outer_graphs_are_refused():
    q = torch.zeros(1, 2, 8, 16)
    layout = HeadLayout((2, None))
    call = call_of(random_case(0).cast(torch.float32))
    assert flex.supports(call) is None
    compiled = torch.compile(lambda q: flex.supports(replace(call, q=q)), backend="aot_eager")
    assert compiled(call.q) == "FlexAttention is compiled by itself, not in another graph"
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        attention(q, q, q, layout, backend="flex")
    with pytest.raises(ValueError, match=r"the transforms of torch\.func"):
        torch.vmap(lambda x: attention(x, q, q, layout, backend="flex"))(q[None])


def test_a_gpu_needs_head_dim_16_and_triton(monkeypatch):
    class OnGPU:
        """What `supports` looks at in a tensor on a GPU."""

        device, dtype, shape = torch.device("cuda"), torch.float32, (1, 2, 8, 8)

    call = call_of(random_case(0).cast(torch.float32))
    on_gpu = replace(call, q=OnGPU())
    assert flex.supports(on_gpu) == "head_dim is 8; FlexAttention takes at least 16 on a GPU"
    OnGPU.shape = (1, 2, 8, 16)
    assert flex.supports(on_gpu) is None
    monkeypatch.setattr(flex, "_HAS_TRITON", False)
    assert flex.supports(on_gpu) == "triton is not installed"


def test_auto_never_takes_it(monkeypatch):
    q = torch.zeros(1, 2, 8, 16)
    assert explain(q, q, q, HeadLayout((2, None))).reasons["flex"] == "it is used by name only"
    for name in ("cpu", "blockwise", "reference"):
        monkeypatch.setattr(BACKENDS[name], "supports", lambda call: "needs a sunny day")
    with pytest.raises(ValueError, match=r"no backend can serve this call; .*flex: it is used by name only"):
        attention(q, q, q, HeadLayout((2, None)))


def test_few_block_masks_are_kept():
    layout = HeadLayout((9, None))
    first = flex.block_mask(layout, 64, 64, True, False, CPU)
    assert flex.block_mask(HeadLayout((9, None)), 64, 64, True, False, CPU) is first
    for length in range(65, 75):
        flex.block_mask(layout, length, length, True, False, CPU)
    assert flex.block_mask(layout, 64, 64, True, False, CPU) is not first


def test_a_block_mask_of_inference_serves_training():
    with torch.inference_mode():
        mask = flex.block_mask(HeadLayout((7, None)), 50, 50, True, False, CPU)
    assert not mask.kv_indices.is_inference()
    assert not mask.mask_mod(*torch.arange(4)).is_inference()

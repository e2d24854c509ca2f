"""Random calls of attention() with all options together, their truth, and the error that plain PyTorch makes.

The truth is written from the definition, row by row, and shares no code with the package.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longshort import HeadLayout, attention
from longshort.attention import BACKENDS, BY_NAME_ONLY

_NOT_RUN = {*BY_NAME_ONLY, *(["triton"] if os.environ.get("TRITON_INTERPRET") != "1" else [])}
RUNNABLE = [name for name in BACKENDS if name not in _NOT_RUN]
"""The backends that `auto` may take and whose kernels run on a CPU: those of Triton in its interpreter."""


@dataclass
class Case:
    """Inputs in float64, to be rounded to the dtype under test."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: HeadLayout
    options: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> Case:
        """The same case, its inputs rounded to dtype."""
        return Case(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.layout, self.options)

    def __repr__(self) -> str:
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return f"Case(q={tuple(self.q.shape)}, kv_len={self.k.shape[2]}, {self.layout}, {shown})"


def random_case(seed: int, max_length: int = 150, logit_scale: float = 1.0) -> Case:
    """A call with a random layout, shape, strides and mix of options."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3])
    head_dim = rng.choice([1, 3, 8, 16, 24])
    lengths = [length for length in (1, 2, 5, 17, 40, 70, 130, 150, 200, 300) if length <= max_length]
    kv_len = rng.choice(lengths)
    q_len = rng.choice([kv_len, kv_len, (kv_len + 1) // 2, 1])
    windows: list[int | None] = []
    for _ in range(kv_heads):
        windows += [rng.choice([None, 1, 2, 5, 16, 33, 64, 1000])] * group
    layout = HeadLayout(tuple(windows), kv_heads, sink_tokens=rng.choice([0, 0, 1, 3, 7]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = kv_heads * group
    q = normal(batch, q_len, heads, head_dim).transpose(1, 2) * logit_scale
    k = normal(batch, kv_heads, head_dim, kv_len).mT
    v = normal(batch, kv_len, kv_heads, 2 * head_dim).transpose(1, 2)[..., ::2]
    options: dict[str, Any] = {"causal": rng.random() < 0.7}
    if rng.random() < 0.3:
        options["scale"] = rng.choice([0.1, 1.0, -0.3])
    if rng.random() < 0.3:
        options["softcap"] = rng.choice([1.5, 20.0])
    if rng.random() < 0.3:
        options["alibi_slopes"] = torch.rand(heads, generator=generator, dtype=torch.float64) - 0.2
    if rng.random() < 0.3:
        options["sink_logits"] = normal(heads)
    if rng.random() < 0.6:
        ids = torch.randint(-1, 3, (batch, kv_len), generator=generator)
        if rng.random() < 0.6:  # one run each, else several
            ids = ids.sort(-1).values
        options["segment_ids"] = ids.to(rng.choice([torch.int64, torch.int32, torch.int8]))
    return Case(q, k, v, layout, options)


def sees(case: Case, ids: list[int], rank: list[int], window: int | None, query: int, key: int) -> bool:
    """The rule of visibility for one pair, in words of Python; `rank` counts earlier keys of a segment."""
    position = case.k.shape[2] - case.q.shape[2] + query
    if ids[position] < 0 or ids[position] != ids[key]:
        return False
    if case.options.get("causal", True) and key > position:
        return False
    return window is None or abs(position - key) < window or rank[key] < case.layout.sink_tokens


def visibility(case: Case) -> Tensor:
    """(batch, heads, q_len, kv_len) by `sees`, pair by pair."""
    batch, _, q_len = case.q.shape[:3]
    kv_len = case.k.shape[2]
    if "segment_ids" not in case.options and kv_len > 300:
        return visibility_of_one_segment(case)
    segment_ids = case.options.get("segment_ids", torch.zeros(batch, kv_len, dtype=torch.int64)).tolist()
    ranks = [[ids[:key].count(ids[key]) for key in range(kv_len)] for ids in segment_ids]
    per_window = {
        window: torch.tensor(
            [
                [[sees(case, ids, rank, window, i, j) for j in range(kv_len)] for i in range(q_len)]
                for ids, rank in zip(segment_ids, ranks, strict=True)
            ],
            dtype=torch.bool,
        ).view(batch, q_len, kv_len)
        for window in set(case.layout.windows)
    }
    return torch.stack([per_window[window] for window in case.layout.windows], 1)


def visibility_of_one_segment(case: Case) -> Tensor:
    """The rule of `sees` for all pairs at once, for cases too long to go through one by one."""
    q_len, kv_len = case.q.shape[2], case.k.shape[2]
    key = torch.arange(kv_len)
    behind = key[kv_len - q_len :, None] - key
    heads = []
    for window in case.layout.windows:
        near = behind.abs() < window if window is not None else torch.ones_like(behind, dtype=torch.bool)
        seen = near | (key < case.layout.sink_tokens)
        heads.append(seen & (behind >= 0) if case.options.get("causal", True) else seen)
    return torch.stack(heads).expand(case.q.shape[0], -1, -1, -1)


@dataclass
class Result:
    """What a way of computing gives for a case; gradients of q, k, v (and sink logits)."""

    out: Tensor
    lse: Tensor
    max_logit: Tensor
    entropy: Tensor
    gradients: list[Tensor]


def _loss_weights(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    out = torch.randn(case.q.shape, generator=generator, dtype=torch.float64)
    return out, torch.randn(case.q.shape[:3], generator=generator, dtype=torch.float64)


def leaves_of(case: Case) -> list[Tensor]:
    """Copies of the inputs of a case that require gradients: q, k, v (and sink logits)."""
    leaves = [case.q, case.k, case.v]
    if "sink_logits" in case.options:
        leaves.append(case.options["sink_logits"].to(case.q.dtype))
    return [x.detach().clone().requires_grad_() for x in leaves]


def gradients_of(case: Case, out: Tensor, lse: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss that weighs every number of out and lse."""
    out_weight, lse_weight = _loss_weights(case)
    finite_lse = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out * out_weight.to(out)).sum() + (finite_lse * lse_weight.to(lse)).sum()
    return list(torch.autograd.grad(loss, leaves))


def computed(case: Case, backend: str, with_gradients: bool = True) -> Result:
    """attention() with this backend."""
    leaves = leaves_of(case)
    if not with_gradients:
        leaves = [x.detach() for x in leaves]
    options = dict(case.options)
    if "sink_logits" in options:
        options["sink_logits"] = leaves[3]
    q, k, v = leaves[:3]
    out, stats = attention(q, k, v, case.layout, backend=backend, return_stats=True, **options)
    gradients = gradients_of(case, out, stats.lse, leaves) if with_gradients else []
    return Result(out.detach(), stats.lse.detach(), stats.max_logit, stats.entropy, gradients)


def plain(case: Case, visible: Tensor) -> Result:
    """What anyone would write with plain PyTorch, in the dtype of the case's inputs; the truth in float64."""
    leaves = leaves_of(case)
    q, k, v = leaves[:3]
    options, dtype = case.options, q.dtype
    group = case.layout.group_size
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.mT * options.get("scale", q.shape[-1] ** -0.5)
    scores = logits
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if "alibi_slopes" in options:
        key = torch.arange(k.shape[2])
        distance = (key[k.shape[2] - q.shape[2] :, None] - key).abs()
        scores = scores - options["alibi_slopes"].to(dtype)[:, None, None] * distance
    seen = visible.any(-1)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.where(seen, torch.where(seen[..., None], scores, 0.0).logsumexp(-1), -torch.inf)
    columns = scores
    if "sink_logits" in options:
        sink = leaves[3][:, None, None].expand(*scores.shape[:3], 1)
        columns = torch.cat([scores, sink], -1)
    probabilities = torch.where(seen[..., None], columns, 0.0).softmax(-1)[..., : scores.shape[-1]]
    probabilities = torch.where(visible, probabilities, 0.0)
    out = probabilities @ v

    with torch.no_grad():
        max_logit = torch.where(visible, logits, 0.0).abs().amax(dim=(0, 2, 3))
        p = torch.where(seen[..., None], scores, 0.0).softmax(-1)
        row_entropy = torch.where(seen, -torch.special.xlogy(p, p).sum(-1), 0.0)
        rows = seen.sum(dim=(0, 2)).clamp(min=1)
        entropy = row_entropy.sum(dim=(0, 2)) / rows
    gradients = gradients_of(case, out, lse, leaves)
    return Result(out.detach(), lse.detach(), max_logit, entropy, gradients)


def errors(result: Result, truth: Result) -> dict[str, float]:
    """Largest absolute error of each part."""
    parts = {
        "out": (result.out, truth.out),
        "lse": (result.lse, truth.lse),
        "max_logit": (result.max_logit, truth.max_logit),
        "entropy": (result.entropy, truth.entropy),
    }
    for name, ours, true in zip(("q", "k", "v", "sink"), result.gradients, truth.gradients, strict=False):
        parts[f"gradient of {name}"] = (ours, true)
    return {name: _largest_error(ours, true) for name, (ours, true) in parts.items()}


# of the largest value: where plain PyTorch happens to be exact, twice its error is nothing
_SLACK = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}


def errors_of_plain(case: Case, visible: Tensor, truth: Result) -> dict[str, float]:
    """The largest error of plain PyTorch over a few orders of the numbers in queries and keys.

    The order in which a library sums q·k changes by processor, and with it the error: at logits of thousands,
    where a few pairs decide the largest error, one order alone is a matter of luck.
    """
    head_dim = case.q.shape[3]
    generator = torch.Generator().manual_seed(3)
    orders = [torch.arange(head_dim), *(torch.randperm(head_dim, generator=generator) for _ in range(3))]
    found: dict[str, float] = {}
    for order in orders:
        reordered = Case(case.q[..., order], case.k[..., order], case.v, case.layout, case.options)
        result = plain(reordered, visible)
        back = order.argsort()
        result.gradients[:2] = [gradient[..., back] for gradient in result.gradients[:2]]
        for name, error in errors(result, truth).items():
            found[name] = max(error, found.get(name, 0.0))
    return found


def assert_as_good_as_plain(
    case: Case, dtype: torch.dtype, backend: str, with_gradients: bool = True
) -> None:
    """At most twice the error of plain PyTorch in the same precision, against the truth in float64."""
    case = case.cast(dtype)
    assert_result_as_good_as_plain(computed(case, backend, with_gradients), case)


def assert_result_as_good_as_plain(result: Result, case: Case) -> None:
    """The same for a result that is there already; gradients that it lacks are not compared."""
    dtype = case.q.dtype
    visible = visibility(case)
    truth = plain(case.cast(torch.float64), visible)
    ours = errors(result, truth)
    theirs = errors_of_plain(case, visible, truth)
    sizes = {
        "out": truth.out, "lse": truth.lse.clamp(min=0), "max_logit": truth.max_logit,
        "entropy": truth.entropy,
    }  # fmt: skip
    for name, gradient in zip(("q", "k", "v", "sink"), truth.gradients, strict=False):
        sizes[f"gradient of {name}"] = gradient
    for name, error in ours.items():
        size = sizes[name].abs().max().item() if sizes[name].numel() else 0.0
        allowed = 2 * theirs[name] + _SLACK[dtype] * max(size, 1.0)
        assert error <= allowed, f"{name} of {case}: {error:.3g}, plain PyTorch {theirs[name]:.3g}"


def _largest_error(ours: Tensor, true: Tensor) -> float:
    if ours.numel() == 0:
        return 0.0
    ours = ours.double()
    same = ours == true  # also -inf where nothing is seen
    return torch.where(same, 0.0, (ours - true).abs()).max().item()

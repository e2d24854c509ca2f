"""Hidden keys: a control experiment in which a random share of each sequence's keys is hidden from all heads
while a model trains, so that what is left for them to express is sparse (Hajra 2025 hides half)."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort.attention import AttentionStats, attention, cast_as_autocast
from longshort.layers import LongShortAttention
from longshort.layout import HeadGroup, HeadLayout
from longshort.model import LongShortForCausalLM

_PRECISIONS = ("input", "fp64", "fp32", "bf16")
_REFUSED = ("softcap", "alibi_slopes", "sink_logits", "segment_ids", "round_probabilities")


def hide_keys(model: LongShortForCausalLM, share: float, seed: int) -> None:
    """Hide a random share of the keys in the training passes of a model, the same keys for all heads and
    layers; a query always sees itself.

    The hidden keys of a sequence follow from the seed and its tokens alone. So models of any layout that see
    the same batches have the same keys hidden, and a resumed run hides what it would have hidden. In
    evaluation mode nothing is hidden: losses and logits are then measured on the task and on the pairs of
    every other model.

    Attention takes n × n masks. A monitor sees the statistics of the visible pairs, but what it computes
    itself (row ranges, logits in a band) is over all pairs of the layout.

    Args:
        model: a model that nothing else has changed.
        share: part of the keys, 0 <= share < 1; rounded to a whole number of keys.
        seed: an integer >= 0.

    Raises:
        ValueError: share is out of its range, or a layer has a softcap, ALiBi, sink logits, sink tokens or an
            attention_precision that rounds in a kernel ("bf16-flash", "sdpa-bf16").
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be a number from 0 up to, but not including, 1, got {share!r}")
    layers = [module for module in model.modules() if isinstance(module, LongShortAttention)]
    for layer in layers:
        _check(layer)
    hidden = _HiddenKeys(share, seed)
    draw: Any = torch.compiler.disable(hidden.draw)
    model.model.register_forward_pre_hook(draw, with_kwargs=True)
    for layer in layers:
        layer.function = hidden.attend


def _check(layer: LongShortAttention) -> None:
    found = {
        "softcap": layer.softcap is not None,
        "alibi_slopes": layer.alibi_slopes is not None,
        "sink_logits": layer.sink_logits is not None,
        "sink_tokens": layer.layout.sink_tokens > 0,
        f"attention_precision {layer.attention_precision!r}": layer.attention_precision not in _PRECISIONS,
    }
    refused = [name for name, is_there in found.items() if is_there]
    if refused:
        raise ValueError(f"model must have layers whose keys can be hidden, got one with {refused[0]}")


class _HiddenKeys:
    """The hidden keys of the sequences that pass through a model, and attention without them."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._seed = share, seed
        self._pairs: Tensor | None = None  # (batch, 1, n, n), True where neither causality nor hiding forbids

    def draw(self, module: torch.nn.Module, _arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Draw the keys of a pass through the decoder, before it begins."""
        self._pairs = None
        if module.training:
            tokens = inputs["input_ids"]
            is_hidden = torch.stack([self.hidden_keys(row) for row in tokens.cpu()])
            length = tokens.shape[1]
            pairs = torch.ones(length, length, dtype=torch.bool).tril() & ~is_hidden[:, None, None]
            self._pairs = (pairs | torch.eye(length, dtype=torch.bool)).to(tokens.device)

    def hidden_keys(self, tokens: Tensor) -> Tensor:
        """Draw the hidden keys of a sequence: bool, True where a key is hidden."""
        content = tokens.to(torch.int64).numpy().astype("<i8").tobytes()
        digest = hashlib.sha256(f"{self._seed} ".encode() + content).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        order = torch.randperm(len(tokens), generator=generator)
        return order < round(self._share * len(tokens))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, *, return_stats: bool = False,
        backend: str = "auto", **options: Any,
    ) -> Tensor | tuple[Tensor, AttentionStats]:  # fmt: skip
        """Compute what `attention` does, without the hidden keys of the last pass.

        Scores and sums are in fp32 (fp64 for fp64). In evaluation mode this is `attention` itself.
        """
        if self._pairs is None:
            plain: Any = attention
            return plain(q, k, v, layout, return_stats=return_stats, backend=backend, **options)
        given = [name for name in _REFUSED if options.get(name) is not None and options[name] is not False]
        if given:
            raise ValueError(f"hidden keys do not go with {given[0]}")
        assert q.shape[2] == k.shape[2] == self._pairs.shape[-1]
        q, k, v = cast_as_autocast(q, k, v)
        outputs, statistics = [], []
        with torch.autocast(q.device.type, enabled=False):
            for group in layout.groups:
                visible = self._pairs if group.window is None else self._pairs.triu(1 - group.window)
                q_group, k_group, v_group = _group_inputs(q, k, v, layout, group)
                outputs.append(F.scaled_dot_product_attention(q_group, k_group, v_group, attn_mask=visible))
                if return_stats:
                    statistics.append(_statistics(q_group, k_group, visible))
        order = [head for group in layout.groups for head in group.heads]
        places = torch.tensor(order, device=q.device).argsort()
        out = torch.cat(outputs, dim=1)[:, places].to(q.dtype)
        if not return_stats:
            return out
        lse, max_logit, entropy = zip(*statistics, strict=True)
        return out, AttentionStats(
            torch.cat(lse, dim=1)[:, places], torch.cat(max_logit)[places], torch.cat(entropy)[places]
        )


def _group_inputs(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, group: HeadGroup) -> list[Tensor]:
    """Return q, k and v of a group's heads, in fp32 or above, with keys and values for each query head."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    kv_heads = [head // layout.group_size for head in group.heads]
    return [q[:, list(group.heads)].to(dtype), k[:, kv_heads].to(dtype), v[:, kv_heads].to(dtype)]


def _statistics(q: Tensor, k: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute lse, largest logit and mean entropy as in `AttentionStats`; every query sees itself."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    lse = scores.masked_fill(~visible, -math.inf).logsumexp(-1)
    with torch.no_grad():
        max_logit = scores.abs().masked_fill(~visible, 0.0).amax((0, 2, 3))
        shares = (scores - lse[..., None]).masked_fill(~visible, -math.inf).exp()
        entropy = lse - (shares * scores).sum(-1)
    return lse, max_logit, entropy.mean((0, 2))

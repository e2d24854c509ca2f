"""The dense local task on tokens, learned by one real attention layer.

The target of token i is a weighted mean of fixed random vectors of the last `span` tokens; the weights are a
softmax of a random N(0, σ²) table at (token i, token j). One `LongShortAttention` of one head, with token
embeddings and learned, rotary or no positions, is trained on it, with new random sequences in every step. The
loss is the mean squared error over the mean square of the target: 1 if the output is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longshort.layers import LongShortAttention, Rotary
from longshort.layout import HeadLayout
from longshort.stability import AttentionMonitor
from longshort.studies.dense_local.task import Curve, Fit, make_optimizer, rounded_or_none, visible_pairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SEQUENCES = 2  # per step
_SEQUENCES_TO_MEASURE = 4


class TokenTask:
    """The target outputs for sequences of random tokens.

    The vocabulary is twice, and the embedding's width four times, head_dim: the rank of the table is higher
    than that of one head, local or global. The vectors' rank is head_dim, so that a head's values can express
    them.
    """

    def __init__(self, fit: Fit, generator: torch.Generator, device: torch.device | str) -> None:
        self.vocabulary, self.width = 2 * fit.head_dim, 4 * fit.head_dim
        table = fit.sigma * torch.randn(self.vocabulary, self.vocabulary, generator=generator)
        left = torch.randn(self.vocabulary, fit.head_dim, generator=generator)
        right = torch.randn(fit.head_dim, self.width, generator=generator)
        self._table = table.to(device)
        self._vectors = (left @ right / math.sqrt(fit.head_dim)).to(device)
        self._outside = ~visible_pairs(fit.length, fit.span, device)
        self._length = fit.length

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "count length"]:
        """Draw sequences of random tokens."""
        tokens = torch.randint(self.vocabulary, (count, self._length), generator=generator)
        return tokens.to(self._table.device)

    def wanted(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Compute the target outputs."""
        logits = self._table[tokens[:, :, None], tokens[:, None, :]]
        return logits.masked_fill(self._outside, -math.inf).softmax(-1) @ self._vectors[tokens]


class TokenLayer(nn.Module):
    """Embeddings, positions and one attention layer; the weights of a seed are the same for all windows."""

    def __init__(self, fit: Fit, task: TokenTask, generator: torch.Generator) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(task.vocabulary, task.width)
        self.embed_positions = nn.Embedding(fit.length, task.width) if fit.form == "learned" else None
        self.attention = LongShortAttention(
            task.width, HeadLayout(windows=(fit.window,)), fit.head_dim,
            rotary=Rotary() if fit.form == "rotary" else None,
            attention_precision=fit.precision,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                std = 1.0 if name.startswith("embed") else 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        hidden = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions.weight
        return self.attention(hidden)


def relative_error(
    out: Float[Tensor, "batch length width"], wanted: Float[Tensor, "batch length width"]
) -> Float[Tensor, ""]:
    """Compute the mean squared error over the mean square of the target."""
    return (out - wanted).square().mean() / wanted.square().mean()


def run_layer_fit(
    fit: Fit, device: torch.device | str, report_progress: Callable[[float], None] = lambda _share: None
) -> dict[str, Any]:
    """Train a layer on the task.

    Returns:
        loss (see the module), on sequences that were not trained on; max_logit and row_range at the end, on
        the same; max_logit_in_band: [[span, the largest logit inside the band]] for a global head, else [];
        steps, losses, max_logits: curves. A number that was not finite is None.
    """
    generator = torch.Generator().manual_seed(fit.seed)
    task = TokenTask(fit, generator, device)
    model = TokenLayer(fit, task, generator).to(device)
    unseen = task.draw(_SEQUENCES_TO_MEASURE, generator)
    wanted = task.wanted(unseen)
    monitor = AttentionMonitor(model, fit.span, row_range=True)
    optimizer = make_optimizer(fit, list(model.parameters()))
    curve = Curve(fit.steps)
    value, reading = math.nan, None
    for step in range(fit.steps + 1):
        if step in curve.due:
            with torch.no_grad(), monitor.observing():
                value = relative_error(model(unseen), wanted).item()
            reading = monitor.reading()
            curve.add(step, value, reading.max_logit)
            report_progress(step / fit.steps)
            if step == fit.steps or not math.isfinite(value):
                break
        tokens = task.draw(SEQUENCES, generator)
        optimizer.zero_grad()
        relative_error(model(tokens), task.wanted(tokens)).backward()
        optimizer.step()
    assert reading is not None and reading.row_range is not None
    in_band = reading.max_logit_global_in_band
    return {
        "loss": rounded_or_none(value),
        "max_logit": rounded_or_none(reading.max_logit),
        "max_logit_in_band": [] if in_band is None else [[fit.span, rounded_or_none(in_band)]],
        "row_range": rounded_or_none(reading.row_range),
        **curve.as_json(),
    }

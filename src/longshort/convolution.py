"""A causal depthwise convolution over the sequence: local dependencies without attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longshort.checks import require_integer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ShortConvolution(nn.Module):
    """A causal depthwise convolution: out[t] = Σ_j weight[:, j]·x[t - j] for j = 0 ... kernel_size - 1, as
    Primer (So et al. 2021, arXiv 2109.08668) has it on queries, keys and values. It starts as the identity.

    Args:
        channels: >= 1.
        kernel_size: >= 2, the token itself included.
        device, dtype: those of `weight`, (channels, kernel_size).

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integer("channels", channels, minimum=1)
        require_integer("kernel_size", kernel_size, minimum=2)
        self.weight = nn.Parameter(torch.empty(channels, kernel_size, device=device, dtype=dtype))
        with torch.no_grad():
            self.weight.copy_(self.identity())

    def identity(self) -> Float[Tensor, "channels kernel"]:
        """Return the weight with which the output is the input; no random number is drawn for it."""
        weight = torch.zeros(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
        weight[:, 0] = 1
        return weight

    def forward(
        self,
        x: Float[Tensor, "batch sequence channels"],
        segment_ids: Int[Tensor, "batch sequence"] | None = None,
    ) -> Float[Tensor, "batch sequence channels"]:
        """Mix each token with those before it, in the dtype of x.

        Args:
            x: any floating dtype; nothing comes before its first token.
            segment_ids: a token is mixed only with tokens before it that have the same id without a gap.
        """
        weight = self.weight.to(x.dtype)
        out = x * weight[:, 0]
        reaches = None
        for back in range(1, min(weight.shape[1], x.shape[1])):
            earlier = x[:, :-back] * weight[:, back]
            if segment_ids is not None:
                same = segment_ids[:, back:] == segment_ids[:, :-back]
                reaches = same if reaches is None else same & reaches[:, 1:]
                earlier = earlier.masked_fill(~reaches[..., None], 0.0)
            out = out + F.pad(earlier, (0, 0, back, 0))
        return out

    def extra_repr(self) -> str:
        channels, kernel_size = self.weight.shape
        return f"{channels}, kernel_size={kernel_size}"

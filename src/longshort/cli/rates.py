"""Flags for the rates that a model of time assumes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from longshort.model.scaling import Rates
from longshort.training.utilization import published_peak

_GPU = "H100 80GB HBM3"


@dataclass(frozen=True, kw_only=True)
class RateFlags:
    peak_tflops: Annotated[float, Gt(0)] | None = None
    """Assumed: peak of a GPU in 10^12 operations per second. None: the published one of an H100 (SXM) in the
    precision, without TF32."""

    matrix_share: Annotated[float, Gt(0), Le(1)] = Rates.matrix_share
    """Assumed: part of the peak that products of matrices reach."""

    attention_share: Annotated[float, Gt(0), Le(1)] = Rates.attention_share
    """Assumed: part of the peak that attention of global heads reaches."""

    local_share: Annotated[float, Gt(0), Le(1)] = Rates.local_share
    """Assumed: part of the peak that attention of local heads reaches, which memory bounds."""

    node_bandwidth: Annotated[float, Gt(0)] = Rates.node_bandwidth
    """Assumed: GB/s that a GPU sends to others of its node."""

    network_bandwidth: Annotated[float, Gt(0)] = Rates.network_bandwidth
    """Assumed: GB/s that a GPU sends to those of other nodes."""

    gpus_per_node: Annotated[int, Ge(1)] = Rates.gpus_per_node
    """GPUs of a node."""

    latency: Annotated[float, Ge(0)] = Rates.latency
    """Assumed: microseconds before the first byte of a message."""

    overlap: Annotated[float, Ge(0), Le(1)] = Rates.overlap
    """Assumed: part of the time of computing behind which transfers may hide."""

    def rates(self, precision: Literal["bf16", "fp32"]) -> Rates:
        """Return the assumed rates for products in this precision."""
        given = {field.name: getattr(self, field.name) for field in fields(Rates)}
        if self.peak_tflops is None:
            peak = published_peak(_GPU, precision)
            assert peak is not None
            given["peak_tflops"] = peak / 1e12
        return Rates(**given)

    def describe(self, *precisions: Literal["bf16", "fp32"]) -> str:
        """Say in a few lines what the times rest on."""
        peaks = {self.rates(one).peak_tflops: one for one in precisions}
        peak = ", ".join(
            f"{value:g}" + (f" in {one}" if len(peaks) > 1 else "") for value, one in peaks.items()
        )
        source = "(published, H100 SXM, dense)" if self.peak_tflops is None else "(given)"
        return (
            f"Times are a model, not measured. Assumed: {peak} TFLOP/s a GPU\n"
            f"{source}; {self.matrix_share:.0%} of it in matrices, "
            f"{self.attention_share:.0%} in global heads,\n"
            f"{self.local_share:.0%} in local heads; {self.node_bandwidth:g} GB/s in a node of "
            f"{self.gpus_per_node}, {self.network_bandwidth:g} GB/s a GPU between\n"
            f"nodes; {self.latency:g} us a message; transfers hide behind {self.overlap:.0%} of computing."
        )

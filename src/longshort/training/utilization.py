"""Model FLOPs utilization (MFU): the share of its devices' peak that a training turns into progress.

As PaLM defines it (Chowdhery et al. 2022, appendix B): the operations that a token needs, forward and
backward, times the tokens per second, by the peak. What is recomputed, or computed of pairs that are not
visible, is no progress. Each sequence counts as one document, so with `separate_documents` the number is too
large.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import torch

from longshort.model import LongShortConfig, training_flops

if TYPE_CHECKING:
    from longshort.training.config import TrainConfig
    from longshort.training.parallel import Ranks
    from longshort.training.run import RunConfig

Products = Literal["bf16", "tf32", "fp32"]
"""What the products of matrices are computed in."""

_PEAKS: dict[str, dict[Products, float]] = {
    r"A100-.*|A100 .*": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    r"H100 80GB HBM3": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    r"H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    r"H200": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    r"B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    r"L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    r"L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    r"A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    r"GeForce RTX 3090": {"bf16": 71, "tf32": 35.6, "fp32": 35.6},
    r"GeForce RTX 4090": {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    r"GeForce RTX 5090": {"bf16": 209.5, "tf32": 104.8, "fp32": 104.8},
    r"AMD Instinct MI250X.*": {"bf16": 191.5, "tf32": 47.9, "fp32": 47.9},
    r"AMD Instinct MI300X.*": {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},
}
"""Peaks by the name that torch gives a device, in 10^12 operations per second, dense, with sums in fp32, as
vendors publish them. An MI250X is two devices; it has no TF32."""


def published_peak(name: str, products: Products) -> float | None:
    """Return the published peak of the GPU that torch calls `name`, in operations per second; None if it is
    not in the table, or a part of a GPU (MIG)."""
    if "MIG" in name:
        return None
    model = name.removeprefix("NVIDIA ")
    found = (peaks[products] for pattern, peaks in _PEAKS.items() if re.fullmatch(pattern, model))
    peak = next(found, None)
    return None if peak is None else 1e12 * peak


def seconds_at_peak(run: RunConfig, ranks: Ranks) -> float | None:
    """Return the seconds in which all devices at their peak would train on one token; None if the peak is
    unknown."""
    peak = _peak(run.training, ranks.device)
    length = run.training.sequence_length
    if peak is None or length is None:
        return None
    flops = training_flops(LongShortConfig.from_dict(run.model), length).total
    return flops / length / (peak * ranks.world_size)


def _peak(settings: TrainConfig, device: torch.device) -> float | None:
    if settings.peak_tflops is not None:
        return 1e12 * settings.peak_tflops
    if device.type != "cuda":
        return None
    products: Products = "bf16"
    if settings.precision == "fp32":
        products = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return published_peak(torch.cuda.get_device_name(device), products)

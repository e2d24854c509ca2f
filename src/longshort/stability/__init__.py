"""Monitoring of attention while a model trains, and remedies if its logits explode."""

from longshort.stability.monitor import MAX_LOGITS, ROW_RANGES, AttentionMonitor, Reading
from longshort.stability.probe import AttentionProbe, ProbeReading
from longshort.stability.remedies import QKClip, scale_qk_learning_rate, z_loss
from longshort.stability.rounding import GradientError, audit_rounding
from longshort.stability.spikes import Spike, SpikeDetector, divergence_step

__all__ = [
    "MAX_LOGITS",
    "ROW_RANGES",
    "AttentionMonitor",
    "AttentionProbe",
    "GradientError",
    "ProbeReading",
    "QKClip",
    "Reading",
    "Spike",
    "SpikeDetector",
    "audit_rounding",
    "divergence_step",
    "scale_qk_learning_rate",
    "z_loss",
]

"""Monitoring of attention while a model trains, and remedies if its logits explode."""

from longshort.stability.alarms import ALARMS, Alarm, QueryKeyWeights, UpdateEntropy
from longshort.stability.monitor import MAX_LOGITS, ROW_RANGES, AttentionMonitor, Measurements, Reading
from longshort.stability.probe import AttentionProbe, ProbeReading
from longshort.stability.remedies import QKClip, scale_qk_learning_rate, z_loss
from longshort.stability.rounding import GradientError, audit_rounding
from longshort.stability.spikes import Spike, SpikeDetector, divergence_onset, divergence_step

__all__ = [
    "ALARMS",
    "MAX_LOGITS",
    "ROW_RANGES",
    "Alarm",
    "AttentionMonitor",
    "AttentionProbe",
    "GradientError",
    "Measurements",
    "ProbeReading",
    "QKClip",
    "QueryKeyWeights",
    "Reading",
    "Spike",
    "SpikeDetector",
    "UpdateEntropy",
    "audit_rounding",
    "divergence_onset",
    "divergence_step",
    "scale_qk_learning_rate",
    "z_loss",
]

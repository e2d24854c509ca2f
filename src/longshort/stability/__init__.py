"""Monitoring of attention while a model trains, and remedies if its logits explode."""

from longshort.stability.alarms import (
    ALARM_MEASUREMENTS,
    ALARMS,
    Alarm,
    EntropyFall,
    QueryKeyWeights,
    RowRangeSlope,
    UpdateEntropy,
    alarm_score,
)
from longshort.stability.monitor import MAX_LOGITS, ROW_RANGES, AttentionMonitor, Measurements, Reading
from longshort.stability.probe import AttentionProbe, ProbeReading
from longshort.stability.remedies import QKClip, scale_qk_learning_rate, z_loss
from longshort.stability.rounding import GradientError, audit_rounding
from longshort.stability.spikes import ALARM_BOUNDS, Spike, SpikeDetector, divergence_onset, divergence_step

__all__ = [
    "ALARMS",
    "ALARM_BOUNDS",
    "ALARM_MEASUREMENTS",
    "MAX_LOGITS",
    "ROW_RANGES",
    "Alarm",
    "AttentionMonitor",
    "AttentionProbe",
    "EntropyFall",
    "GradientError",
    "Measurements",
    "ProbeReading",
    "QKClip",
    "QueryKeyWeights",
    "Reading",
    "RowRangeSlope",
    "Spike",
    "SpikeDetector",
    "UpdateEntropy",
    "alarm_score",
    "audit_rounding",
    "divergence_onset",
    "divergence_step",
    "scale_qk_learning_rate",
    "z_loss",
]

"""Costs of training on many GPUs, from formulas: memory, operations, bytes sent, a model of time."""

from longshort.model.scaling.keys import KeyTraffic
from longshort.model.scaling.memory import TrainingMemory, training_memory
from longshort.model.scaling.plan import TrainingPlan, compare_training, fewest_context_ranks, plan_training
from longshort.model.scaling.setup import TrainingSetup
from longshort.model.scaling.step_time import Rates, StepFlops, StepTime, step_flops, step_time
from longshort.model.scaling.traffic import StepTraffic, layer_traffic, step_traffic
from longshort.model.scaling.weights import Weights

__all__ = [
    "KeyTraffic",
    "Rates",
    "StepFlops",
    "StepTime",
    "StepTraffic",
    "TrainingMemory",
    "TrainingPlan",
    "TrainingSetup",
    "Weights",
    "compare_training",
    "fewest_context_ranks",
    "layer_traffic",
    "plan_training",
    "step_flops",
    "step_time",
    "step_traffic",
    "training_memory",
]

"""Implements BEiT-3 as plain PyTorch modules over packed batches, without DeepSpeed."""

from beit3_ds.model.beit3 import BEiT3
from beit3_ds.model.features import Features
from beit3_ds.model.initialization import initial_value, initialize_parameters
from beit3_ds.model.pretrained import PretrainedWeights
from beit3_ds.model.stage_model import LossOutput, StageModel
from beit3_ds.model.step_features import StepFeatures, StepLoss
from beit3_ds.model.task_model import Head, TaskModel

__all__ = [
    "BEiT3",
    "Features",
    "Head",
    "LossOutput",
    "PretrainedWeights",
    "StageModel",
    "StepFeatures",
    "StepLoss",
    "TaskModel",
    "initial_value",
    "initialize_parameters",
]

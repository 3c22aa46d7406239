"""The layers cut into stages, and the one schedule that owns micro-batches."""

from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.pipeline.stages import cut_layers, stage_layers

__all__ = ["Schedule", "cut_layers", "stage_layers"]

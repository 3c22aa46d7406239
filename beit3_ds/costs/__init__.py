"""What a layout costs: the traffic of every rank in a step and the memory that it needs, worked out from shapes."""

from beit3_ds.costs.holding import Holding, build_holding
from beit3_ds.costs.traffic import Load, Traffic, load_of, step_traffic

__all__ = ["Holding", "Load", "Traffic", "build_holding", "load_of", "step_traffic"]

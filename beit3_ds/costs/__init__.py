"""What a layout costs: the traffic of every rank in a step and the memory that it needs, worked out from shapes."""

from beit3_ds.costs.holding import Holding, build_holding
from beit3_ds.costs.load import Load, expected_loads, load_of
from beit3_ds.costs.memory import Memory, rank_memory
from beit3_ds.costs.stages import bubble_share, describe_stages
from beit3_ds.costs.traffic import Traffic, step_traffic

__all__ = [
    "Holding",
    "Load",
    "Memory",
    "Traffic",
    "bubble_share",
    "build_holding",
    "describe_stages",
    "expected_loads",
    "load_of",
    "rank_memory",
    "step_traffic",
]

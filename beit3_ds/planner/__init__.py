"""What a layout costs: the traffic of every rank in a step and the memory that it needs, worked out from shapes."""

from beit3_ds.planner.host import HostNeeds, NodeSize, check_node, describe_host, host_needs
from beit3_ds.planner.memory import Memory, rank_memory
from beit3_ds.planner.precision import PrecisionCost, describe_precision, precision_cost
from beit3_ds.planner.rank_model import Holding, build_holding
from beit3_ds.planner.stages import bubble_share, describe_stages
from beit3_ds.planner.traffic import Traffic, step_traffic
from beit3_ds.planner.workload import Load, expected_loads, load_of

__all__ = [
    "Holding",
    "HostNeeds",
    "Load",
    "Memory",
    "NodeSize",
    "PrecisionCost",
    "Traffic",
    "bubble_share",
    "build_holding",
    "check_node",
    "describe_host",
    "describe_precision",
    "describe_stages",
    "expected_loads",
    "host_needs",
    "load_of",
    "precision_cost",
    "rank_memory",
    "step_traffic",
]

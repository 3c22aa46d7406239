"""Models the cost of a parallel layout: traffic per step, and memory of ranks and nodes.

The planner computes these costs from tensor shapes.
"""

from beit3_ds.planner.host import HostRequirements, NodeSize, check_node, describe_host, host_requirements
from beit3_ds.planner.memory import Memory, rank_memory
from beit3_ds.planner.model_state import ModelState, model_state
from beit3_ds.planner.precision import PrecisionCost, describe_precision, precision_cost
from beit3_ds.planner.rank_model import RankModel, build_rank_model
from beit3_ds.planner.stages import bubble_share, describe_stages
from beit3_ds.planner.traffic import Traffic, step_traffic
from beit3_ds.planner.workload import Workload, expected_workloads, workload_of

__all__ = [
    "HostRequirements",
    "Memory",
    "ModelState",
    "NodeSize",
    "PrecisionCost",
    "RankModel",
    "Traffic",
    "Workload",
    "bubble_share",
    "build_rank_model",
    "check_node",
    "describe_host",
    "describe_precision",
    "describe_stages",
    "expected_workloads",
    "host_requirements",
    "model_state",
    "precision_cost",
    "rank_memory",
    "step_traffic",
    "workload_of",
]

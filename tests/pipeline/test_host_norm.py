"""Tests the gradient norm that replaces DeepSpeed's for bf16 without ZeRO, also for infinite gradients."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_ds.pipeline import host_norm
from tests.ranks import run_ranks


def norm_over_ranks(largest: float) -> float:
    """Returns two norms on one of two ranks: of a replicated gradient, and of a gradient divided over the ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mpu: Any = SimpleNamespace(get_model_parallel_rank=lambda: rank, get_model_parallel_group=lambda: dist.group.WORLD)
    replicated, split = torch.tensor([2.0, largest]).bfloat16(), torch.tensor([4.0 * rank]).bfloat16()
    split.tensor_model_parallel = True  # type: ignore[attr-defined]
    groups = [host_norm._sum_of_squares([replicated], mpu), 0.0, host_norm._sum_of_squares([split], mpu)]
    return host_norm._read_norm(groups)


@pytest.mark.parametrize("largest", [4.0, math.inf, math.nan])
def test_replicated_gradients_count_once(largest: float) -> None:
    """Catches a gradient that counts twice, a missing sum over ranks, and a norm of 1 if a gradient is not finite."""
    for norm in run_ranks(norm_over_ranks, 2, largest):
        assert norm == 6.0 if largest == 4 else not math.isfinite(norm)


def test_a_norm_that_is_not_finite_is_marked() -> None:
    for value, expected in ((3.0, 3.0), (math.nan, -1.0), (-math.inf, -1.0)):
        norm = torch.tensor(value)
        host_norm._mark_non_finite(norm)
        assert norm.item() == expected

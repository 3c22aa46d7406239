"""What joining the process group settles for a rank."""

import resource

import torch

from tests.ranks import run_ranks
from tests.training.steps import config_for


def count_faults() -> list[int]:
    """Pages that a rank asks the kernel for whenever it makes a tensor as large as one that it freed; 16384 if all."""
    from beit3_ds.training.engine import init_process_group

    mesh = init_process_group(config_for(0).parallel)
    faults = []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    mesh.close()
    return faults


def test_freed_memory_is_used_again() -> None:
    # Not every time: the tensor's own small objects may come to lie behind its memory, which then stands between two
    # pieces of heap until both are freed. Without the setting every one of them asks for all of its pages.
    (faults,) = run_ranks(count_faults, 1)
    assert min(faults[1:]) < 1000

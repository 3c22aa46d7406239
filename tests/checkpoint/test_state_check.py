"""Tests the comparison of the state to be saved with the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.checkpoint.folder import checkpoint_paths
from beit3_ds.checkpoint.state_check import HeldWeights, find_mismatch
from beit3_ds.config import ConfigError
from tests.checkpoint.resharding import Setup, start, train
from tests.ranks import run_ranks
from tests.training.layouts import Layout

SETUPS = [
    Setup(Layout(1, 1, 2), 1),
    Setup(Layout(1, 1, 2), 3),
    Setup(Layout(1, 1, 2), 0, bf16=True),
    Setup(Layout(1, 1, 2), 2, bf16=True),
]


@given(
    sizes=st.lists(st.integers(1, 9000), min_size=2, max_size=4),
    step=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_ranges_in_another_order_are_found(
    sizes: list[int], step: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Catches flat buffers whose ranges are read in another order than they were written."""
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(step))
    held = [part.to(dtype) for part in values.split(sizes)]

    def runs(flat: torch.Tensor) -> list[HeldWeights]:
        parts = zip(flat.split(sizes), held, strict=True)
        return [HeldWeights(f"tensor {i}", ours, theirs, (ours, ours)) for i, (ours, theirs) in enumerate(parts)]

    assert find_mismatch(runs(values), step) is None
    shift = data.draw(st.integers(1, len(values) - 1))
    fault = find_mismatch(runs(values.roll(shift)), step)
    assert fault is not None and "tensor " in fault


def test_nan_is_no_mismatch_and_lost_moments_are_one() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf")])
    assert find_mismatch([HeldWeights("norm", values, values.bfloat16(), (values,))], 0) is None
    assert find_mismatch([HeldWeights("norm", values, values, (values[:2],))], 0) == (
        "norm has 3 weights, but moments of [2]"
    )
    assert find_mismatch([HeldWeights("norm", values, values[:2], ())], 0) == (
        "norm has 2 elements in the model, but 3 in the optimizer"
    )


def masters(optimizer: Any) -> list[torch.Tensor]:
    """Returns the flat float32 master weights of a rank, or the first matrices if they are not flattened."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups")
    found = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return [group if isinstance(group, torch.Tensor) else group[0] for group in found]


def permute_masters(rank: int, optimizer: Any) -> None:
    """Reorders the master weights of rank 1."""
    if rank == 1:
        for flat in masters(optimizer):
            flat.data.copy_(flat.data.flatten().roll(3).view(flat.shape))


def reverse_shares(rank: int, optimizer: Any) -> None:
    """Swaps the ZeRO-3 shares of two ranks, as if partitions had another order."""
    from beit3_ds.checkpoint import flat_tensors

    original = flat_tensors._zero3_ranges

    def reversed_ranges(parameters: list[Any]) -> list[flat_tensors.ParameterRange]:
        ranges = []
        for parameter, first, position, length in original(parameters):
            other = parameter.partition_numel() - first  # two ranks
            length = min(length, max(0, parameter.ds_numel - other))
            ranges.append(flat_tensors.ParameterRange(parameter, other, position, length))
        return ranges

    flat_tensors._zero3_ranges = reversed_ranges


def save_planted(setups: list[Setup], root: Path, plant: Callable[[int, Any], None]) -> list[str]:
    """Saves, trains a step, injects a fault and saves again, for each setup on one rank; returns the errors."""
    mesh, messages = None, []
    for setup in setups:
        mesh, schedule, state, store = start(setup, root / setup.folder, seed=1, mesh=mesh)
        train(setup, schedule, mesh, range(1))
        store.save(state, 1)
        train(setup, schedule, mesh, range(1, 2))
        with torch.no_grad():
            plant(torch.distributed.get_rank(), schedule.engine.optimizer)
        with pytest.raises(ConfigError) as caught:
            store.save(state, 2)
        messages.append(str(caught.value))
        schedule.engine.destroy()
    assert mesh is not None
    mesh.close()
    return messages


def check_refused(setups: list[Setup], root: Path, plant: Callable[[int, Any], None], where: str) -> None:
    messages = run_ranks(save_planted, 2, setups, root, plant)
    assert messages[0] == messages[1]  # all ranks end alike, whichever has the fault
    for setup, message in zip(setups, messages[0], strict=True):
        assert where in message and "compared elements of" in message and "untouched" in message, (setup, message)
        names = [path.name for path in checkpoint_paths(root / setup.folder)]
        assert names == ["step-00000001"], setup  # what was saved stays, nothing half-written is added
        assert not list((root / setup.folder).glob(".writing-*"))


def test_a_planted_permutation_is_refused(tmp_path: Path) -> None:
    check_refused(SETUPS, tmp_path, permute_masters, "rank 1 (")


def test_other_shares_of_zero3_are_refused(tmp_path: Path) -> None:
    """Checks swapped shares: each rank's memory is consistent, so only gathering a parameter reveals the fault."""
    check_refused([SETUPS[1]], tmp_path, reverse_shares, "rank 0 (")

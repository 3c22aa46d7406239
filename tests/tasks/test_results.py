"""Tests that the main rank receives the result of each sample once, in the order of the samples."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_ds.config import ConfigError
from beit3_ds.parallel.host_group import HostGroup
from beit3_ds.tasks import SampleResults
from tests.ranks import run_ranks


def gather_own() -> Any:
    import datetime

    import torch.distributed as dist

    from beit3_ds.parallel.host_group import build_host_group

    dist.init_process_group("gloo")
    try:
        results = SampleResults()
        rank, size = dist.get_rank(), dist.get_world_size()
        for number in range(rank, 7, size):
            results.add(torch.tensor([number]), score=torch.tensor([[number / 3, 1.0]]), text=[f"caption {number}"])
        mesh: Any = SimpleNamespace(host=build_host_group(datetime.timedelta(seconds=60)))
        gathered = results.gather(mesh)
        if gathered is None:
            return None
        return gathered.indices.tolist(), gathered.tensor("score").tolist(), gathered.strings("text")
    finally:
        dist.destroy_process_group()


def test_three_ranks_gather_what_one_has() -> None:
    expected = (
        list(range(7)),
        torch.tensor([[n / 3, 1.0] for n in range(7)]).tolist(),
        [f"caption {n}" for n in range(7)],
    )
    assert run_ranks(gather_own, 3) == [expected, None, None]


def test_a_sample_of_two_ranks_is_refused() -> None:
    results = SampleResults()
    results.add(torch.tensor([4, 2, 4]), right=torch.zeros(3))
    mesh: Any = SimpleNamespace(host=HostGroup())
    with pytest.raises(ConfigError, match="1 samples were evaluated twice, the first of them number 4"):
        results.gather(mesh)


def test_no_samples_give_empty_results() -> None:
    mesh: Any = SimpleNamespace(host=HostGroup())
    gathered = SampleResults().gather(mesh)
    assert gathered is not None and len(gathered) == len(gathered.tensor("right")) == len(gathered.strings("text")) == 0

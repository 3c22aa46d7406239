"""Tests that every call that sends to other ranks is documented, and runs with groups as strict as NCCL's."""

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.collective_calls import find_calls, find_calls_in
from tests.collective_table import BY_READING, DEVICES, HOST, read_table
from tests.ranks import run_ranks
from tests.two_devices import DEVICE, Site, two_devices

TABLE = read_table()


def test_every_call_is_listed() -> None:
    """Catches a new call that is missing in the documentation, and a row whose call no longer exists."""
    found = set(find_calls())
    assert found - TABLE.keys() == set(), "list these in docs/traffic_and_memory.md: what they send, to whom and when"
    assert TABLE.keys() - found == set(), "these are no longer in the source"


def test_the_table_is_complete() -> None:
    """Catches a device group for host values, and rows without dtype, group, moment or known run."""
    for call, row in TABLE.items():
        assert row.group and row.moment and row.run in {*RUNS, "differing", BY_READING}, call
        sends_tensors = row.kinds and not any(word in call.expression for word in ("new_group", "init_", "barrier"))
        assert row.dtypes or not sends_tensors, call
        groups = set(row.group.split(", "))
        if row.kinds == DEVICES:
            assert groups <= {"world", "data", "model", "tensor", "channels", "this rank"}, call
        elif row.kinds == HOST:
            assert not groups & {"world", "data", "model", "tensor", "channels"}, call


def test_names_tell_hosts_from_devices() -> None:
    for call, row in TABLE.items():
        if row.run != BY_READING and not call.file.endswith("host_group.py"):
            of_hosts = "host." in call.expression or (call.file.endswith("mesh.py") and call.function == "build_mesh")
            assert row.kinds == (HOST if of_hosts else DEVICES), call


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as td\ntd.broadcast(x)", ["td.broadcast"]),
        ("import torch\ntorch.distributed.barrier()", ["torch.distributed.barrier"]),
        ("from torch import distributed\ndistributed.send(x, 1)", ["distributed.send"]),
        ("from torch.distributed import all_gather_object as g\ng(x, y)", ["g"]),
        ("from deepspeed import comm as c\nc.reduce(x, 0)", ["c.reduce"]),
        ("import deepspeed.comm\nwork = [deepspeed.comm.all_reduce]", ["deepspeed.comm.all_reduce"]),
        ("self._group.allreduce([x])", ["self._group.allreduce"]),
        ("class A:\n  def f(self):\n    return lambda: self.mesh.host.sum(x)", ["self.mesh.host.sum"]),
        ("x.sum() + x.gather(1, i) + np.broadcast(x) + pipe.send(x)", []),
    ],
)
def test_search_finds_calls_under_other_names(source: str, expected: list[str]) -> None:
    assert [call.expression for call in find_calls_in(source)] == expected


class Outcome(NamedTuple):
    """Holds the exit status of one rank, and the collectives that it called."""

    status: int
    seen: dict[str, dict[Site, set[str]]]


def train(config: str, *, stops: bool = False) -> Outcome:
    """Runs a whole training; with `stops`, rank 1 gets a stop request after its first step."""
    with two_devices() as machine:
        from beit3_ds.train import main
        from beit3_ds.training.progress import Progress

        add = Progress.add

        def add_and_ask(self: Progress, *arguments: Any) -> None:
            add(self, *arguments)
            if stops and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

        Progress.add = add_and_ask  # type: ignore[method-assign]
        return Outcome(main([config]), machine.seen)


def stop(config: str) -> Outcome:
    return train(config, stops=True)


RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # Ranks; DeepSpeed's keys; our section's.
    "data": (2, {"stage": 3, "stage3_param_persistence_threshold": 100}, {}),
    "tensor": (
        2,
        {"stage": 1},
        {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}, "model": {"sub_layernorm": True}},
    ),
    "pipeline": (
        2,
        {"stage": 2},
        {"parallel": {"pipeline_parallel_size": 2}, "model": {"tie_word_embeddings": True}},
    ),
    "tied": (
        4,
        {"stage": 3},
        {"parallel": {"pipeline_parallel_size": 2}, "model": {"tie_word_embeddings": True}},
    ),
    "replicated": (4, {"stage": 0}, {"parallel": {"tensor_parallel_size": 2}}),
    "retrieval": (
        2,
        {"stage": 3},
        {
            "task": {"name": "retrieval"},
            "model": {"inputs": ["images", "texts"]},
            "data": {"images": {"samples_per_step": 0}, "texts": {"samples_per_step": 0}},
        },
    ),
    "offload": (2, {"stage": 3, "offload_optimizer": {"device": "cpu"}}, {}),
    "offload in stage 2": (2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}),
}


def write_config(run: str, mapping: dict[str, Any], folder: Path) -> str:
    _, zero, own = RUNS[run]
    mapping |= {"zero_optimization": zero, "gradient_accumulation_steps": 2}
    for section, values in own.items():
        mapping["beit3_ds"].setdefault(section, {}).update(values)
    mapping["beit3_ds"]["training"] |= {"total_steps": 3, "save_interval": 2}
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return str(path)


def check_seen(run: str, outcomes: list[Outcome]) -> None:
    """Checks that all ranks succeeded and made every call that the table lists for the run, with no other dtypes."""
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes)
    for call, row in TABLE.items():
        if row.run == run:
            for kind in row.kinds:
                site = call.file, call.function
                found = [outcome.seen[kind][site] for outcome in outcomes if site in outcome.seen[kind]]
                assert found, (call, kind)
                assert kind == "host" or set().union(*found) <= row.dtypes, (call, found)


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] * (run != "data")) for run in RUNS])
def test_every_collective_is_of_hosts_or_of_devices(run: str, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Runs all phases of a training with groups that refuse tensors of the wrong device.

    The phases are start, steps, evaluation, save, stop, resume and report. Without separate host groups, no run of
    several ranks could start: "No backend type associated with device type cpu". DeepSpeed's own collectives in these
    phases run too.
    """
    config, ranks = write_config(run, run_mapping, tmp_path), RUNS[run][0]
    stopped = run_ranks(stop, ranks, config) if run == "data" else []
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").exists() == bool(stopped)
    outcomes = run_ranks(train, ranks, config)
    assert (tmp_path / "run" / "summary.json").exists()
    check_seen(run, stopped + outcomes)


MISTAKES = {
    "counts over devices": lambda mesh: mesh.sum_over_data(torch.ones(5)),
    "a decision over devices": lambda mesh: mesh.sum_over_all(torch.ones((), dtype=torch.int64)),
    "a message over devices": lambda mesh: dist.isend(torch.ones(1), 1 - mesh.host.rank),
    "objects gathered over devices": lambda mesh: dist.all_gather_object([None] * 2, "object"),
    "objects broadcast over devices": lambda mesh: dist.broadcast_object_list(["object"]),
    "objects collected over devices": lambda mesh: dist.gather_object("object", [None] * 2 if mesh.is_main else None),
    "gloo's barrier over devices": lambda mesh: dist.monitored_barrier(),
    "a device's tensor over hosts": lambda mesh: mesh.host.sum(torch.ones(2, device=DEVICE)),
    "a device's memory in NumPy": lambda mesh: torch.ones(2, device=DEVICE).numpy(),
    "two devices in one sum": lambda mesh: torch.ones(2, device=DEVICE) + torch.ones(2),
    "a host's index into a device's count": lambda mesh: torch.zeros(3, device=DEVICE).index_add_(
        0, torch.zeros(2, dtype=torch.int64), torch.ones(2)
    ),
}


def check_backward_hooks_see_the_device() -> None:
    """Frees memory during a backward pass as ZeRO-3 does; the emulation must name the device, not the host."""
    leaf = torch.ones(2, device=DEVICE, requires_grad=True)
    freed: list[torch.Tensor] = []
    leaf.register_hook(lambda gradient: freed.append(torch.empty(0, device=leaf.device)))
    leaf.sum().backward()
    torch.autograd.backward(leaf.sum())
    torch.autograd.grad(leaf.sum(), leaf)
    assert [tensor.device for tensor in freed] == [DEVICE] * 3


def differ() -> tuple[dict[str, dict[Site, set[str]]], dict[str, str]]:
    """Calls everything that ranks call when they differ or fail, and makes every mistake that must be refused.

    Returns:
        The collectives that were called, and the error of each mistake.
    """
    from types import SimpleNamespace

    from beit3_ds.config import ConfigError, ParallelConfig
    from beit3_ds.data.files.fingerprint import SourceFile
    from beit3_ds.runtime.process_group import init_process_group
    from beit3_ds.training.agreement import check_same_sources
    from beit3_ds.training.broken_records import BrokenRecords
    from beit3_ds.training.skipped_steps import SkippedSteps
    from tests.data.files.test_fingerprint import Listed

    with two_devices() as machine:
        mesh = init_process_group(ParallelConfig())
        with pytest.raises(ConfigError, match="is missing"):
            check_same_sources(mesh, {"a source": Listed([SourceFile(f"{mesh.host.rank}.tar", 1, 1)])})
        batch: Any = SimpleNamespace(step=3, micro_batches=[SimpleNamespace(sample_names=("a", "b"))])
        probe: Any = SimpleNamespace(find_non_finite=lambda: [0])
        assert len(SkippedSteps(2, mesh).add(batch, float("nan"), probe)["ranks"]) == 2
        broken = BrokenRecords(9, mesh.host)
        assert len(broken.add({f"record {mesh.host.rank}": "its fault"}, "by step 1")) == 2
        refusals = {}
        for name, mistake in MISTAKES.items():
            try:
                mistake(mesh)
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                refusals[name] = str(error)
        doubled = mesh.sum_over_all(torch.ones(2, device=DEVICE)).cpu()
        assert doubled.tolist() == [2, 2]
        check_backward_hooks_see_the_device()
        mesh.close()
    return machine.seen, refusals


def test_what_is_on_the_wrong_side_is_refused() -> None:
    """Checks that the emulated machine refuses mistakes; otherwise the tests above could not fail."""
    for seen, refusals in run_ranks(differ, 2):
        assert refusals.keys() == MISTAKES.keys()
        assert "No backend type associated with device type cpu" in refusals["counts over devices"]
        check_seen("differing", [Outcome(0, seen)])

"""Tests that every call that sends to other ranks is classified, and runs with groups as strict as NCCL's."""

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.collective_calls import Call, find_calls, find_calls_in
from tests.ranks import run_ranks
from tests.two_devices import DEVICE, Site, two_devices

HOST, DEVICES, BOTH = ("host",), ("device",), ("host", "device")
"""Kinds of content: host values over gloo, or device tensors; some wrappers carry both."""
BY_READING = "by reading"


class Row(NamedTuple):
    """Names the kind of content that a call sends, and the run that shows it."""

    kinds: tuple[str, ...]
    run: str


def rows(file: str, kinds: tuple[str, ...], run: str, **functions: str) -> dict[Call, Row]:
    """Builds the rows of one file from the called expressions of each function."""
    return {
        Call(file, function, expression): Row(kinds, run)
        for function, expressions in functions.items()
        for expression in expressions.split()
    }


TABLE: dict[Call, Row] = {
    # The groups and what goes through them.
    **rows("beit3_ds/parallel/host_group.py", HOST, "data", _send="dist.send", _receive="dist.recv"),
    **rows("beit3_ds/parallel/host_group.py", HOST, BY_READING, build_host_group="dist.new_group"),
    **rows(
        "beit3_ds/parallel/mesh.py", DEVICES, BY_READING, own_group="dist.new_group", _group_of_one="dist.new_group"
    ),
    **rows("beit3_ds/parallel/mesh.py", DEVICES, "data", sum_over_all="dist.all_reduce"),
    **rows("beit3_ds/parallel/mesh.py", DEVICES, "replicated", sum_over_model="dist.all_reduce"),
    **rows("beit3_ds/parallel/mesh.py", DEVICES, BY_READING, sum_over_data="dist.all_reduce"),
    **rows("beit3_ds/parallel/mesh.py", DEVICES, "retrieval", gather_rows_over_data="dist.all_gather_into_tensor"),
    **rows(
        "beit3_ds/parallel/mesh.py",
        HOST,
        "data",
        check_agreement="self.host.gather",
        barrier="self.host.barrier",
        build_mesh="host.gather",
    ),
    **rows("beit3_ds/parallel/pipeline.py", DEVICES, "pipeline", send="dist.isend", receive="dist.irecv"),
    **rows("beit3_ds/runtime/watchdog.py", HOST, "data", __init__="mesh.host.barrier"),
    **rows("beit3_ds/parallel/broadcast_batches.py", HOST, "tensor", _broadcast="mesh.tensor.host.broadcast"),
    **rows(
        "beit3_ds/parallel/broadcast_batches.py",
        HOST,
        "pipeline",
        _broadcast_to_stages="pipeline.host.gather pipeline.host.broadcast",
    ),
    **rows(
        "beit3_ds/parallel/tensor.py",
        DEVICES,
        "tensor",
        all_reduce="dist.all_reduce",
        all_gather="dist.all_gather",
        _all_gather_rows="dist.all_gather_into_tensor",
        _reduce_scatter_rows="dist.reduce_scatter_tensor",
        backward="dist.all_reduce ctx.tensor.all_reduce",
        forward="dist.all_reduce",
    ),
    **rows(
        "beit3_ds/parallel/vocabulary.py",
        DEVICES,
        "tensor",
        logits="self.tensor.all_reduce",
        _reduce="self.tensor.all_reduce",
    ),
    # The model: tensors of a forward or backward pass.
    **rows("beit3_ds/model/multiway.py", DEVICES, BY_READING, forward="self.tensor.all_gather self.tensor.all_reduce"),
    **rows("kernels/ops/sub_norm.py", DEVICES, "tensor", join_statistics="self.all_gather"),
    **rows("kernels/ops/out_projection.py", DEVICES, "tensor", _backward_by_operators="form.norm.all_reduce"),
    **rows(
        "kernels/ops/out_projection.py", (), BY_READING, has_whole_rows="self.norm.all_gather"
    ),  # whether there is one
    # The engine and the pipeline.
    **rows("beit3_ds/training/engine.py", DEVICES, "data", build_engine="deepspeed.initialize"),
    **rows("beit3_ds/training/engine.py", HOST, "pipeline", build_engine="mesh.pipeline.host.gather"),
    **rows(
        "beit3_ds/runtime/process_group.py",
        DEVICES,
        BY_READING,
        _join="dist.init_process_group deepspeed.init_distributed",
    ),
    **rows("beit3_ds/training/engine.py", DEVICES, "data", apply_update="engine.step"),
    **rows("beit3_ds/training/engine.py", DEVICES, "replicated", _gradient_norm="mesh.sum_over_model"),
    **rows("beit3_ds/pipeline/deepspeed_compat.py", DEVICES, "data", backward="engine.backward"),
    **rows("beit3_ds/pipeline/deepspeed_compat.py", DEVICES, "data", _zero3_gradient_norm="mesh.sum_over_all"),
    **rows("beit3_ds/pipeline/deepspeed_compat.py", HOST, "offload", _zero3_gradient_norm="mesh.host.sum"),
    **rows("beit3_ds/pipeline/deepspeed_compat.py", HOST, "data", check="mesh.data_host.gather"),
    **rows(
        "beit3_ds/pipeline/schedule.py",
        DEVICES,
        "pipeline",
        receive="self.mesh.pipeline.receive",
        send="self.mesh.pipeline.send",
    ),
    **rows(
        "beit3_ds/pipeline/tied.py",
        DEVICES,
        "pipeline",
        synchronize="self._pipeline.send self._pipeline.receive",
        before_backward="self._pipeline.receive",
        after_backward="self._pipeline.send",
    ),
    **rows("beit3_ds/pipeline/coupled_step.py", HOST, "retrieval", gather_features="mesh.data_host.gather"),
    **rows("beit3_ds/pipeline/coupled_step.py", DEVICES, "retrieval", gather_features="mesh.gather_rows_over_data"),
    **rows("beit3_ds/pipeline/tied.py", DEVICES, "tied", synchronize="deepspeed.zero.GatheredParameters"),
    # Training.
    **rows(
        "beit3_ds/training/agreement.py",
        HOST,
        "differing",
        check_same_sources="mesh.host.gather mesh.host.broadcast",
    ),
    **rows("beit3_ds/training/broken_records.py", HOST, "data", agree="self._mesh.data_host.sum"),
    **rows("beit3_ds/training/broken_records.py", HOST, "differing", add="self._host.gather"),
    **rows("beit3_ds/runtime/distributed_stop_signals.py", HOST, "data", synchronize="self._mesh.host.sum"),
    **rows("beit3_ds/training/stragglers.py", HOST, "data", report="self._mesh.host.sum"),
    **rows("beit3_ds/training/skipped_steps.py", HOST, "differing", add="self._mesh.host.gather"),
    **rows("beit3_ds/training/startup_summary.py", HOST, "data", describe_startup="mesh.host.gather"),
    **rows(
        "beit3_ds/training/progress.py", HOST, "data", losses="self.mesh.host.sum", report="self.mesh.data_host.sum"
    ),
    **rows("beit3_ds/training/evaluation.py", HOST, "data", _sum_over_ranks="mesh.data_host.sum"),
    **rows("beit3_ds/tasks/imagenet/scores.py", HOST, BY_READING, _interleave="mesh.data_host.gather"),
    **rows("beit3_ds/tasks/imagenet/scores.py", DEVICES, BY_READING, _interleave="mesh.gather_rows_over_data"),
    **rows("beit3_ds/tasks/pretraining/baselines.py", HOST, "data", unigram_entropies="mesh.data_host.sum"),
    **rows("beit3_ds/training/evaluation.py", HOST, "pipeline", _sum_over_ranks="mesh.pipeline.host.broadcast"),
    **rows("beit3_ds/tasks/pretraining/baselines.py", HOST, "pipeline", unigram_entropies="mesh.pipeline.host.sum"),
    **rows("beit3_ds/training/evaluation.py", HOST, "retrieval", evaluate_split="evaluator.mesh.host.broadcast"),
    **rows("beit3_ds/training/split_batches.py", HOST, "retrieval", iterate_together="mesh.host.sum"),
    **rows("beit3_ds/training/split_batches.py", HOST, BY_READING, iterate_together="mesh.host.gather"),
    **rows("beit3_ds/tasks/results.py", HOST, "retrieval", gather="mesh.host.collect"),
    **rows("beit3_ds/training/report.py", HOST, "pipeline", write_report="run.mesh.pipeline.host.broadcast"),
    # Checkpoints.
    **rows(
        "beit3_ds/checkpoint/engine_state.py",
        DEVICES,
        "data",
        _gather_persistent="optimizer.persistent_parameters[0].all_gather",
        _gather="deepspeed.zero.GatheredParameters",
    ),
    **rows("beit3_ds/checkpoint/store.py", HOST, "data", _check_state="self._host.gather"),
    **rows(
        "beit3_ds/checkpoint/store.py",
        HOST,
        BY_READING,
        move_finished_aside="self._host.broadcast self._host.barrier",
    ),
    **rows("beit3_ds/checkpoint/loading.py", HOST, "data", agree_on_newest="host.broadcast host.gather"),
    **rows(
        "beit3_ds/checkpoint/background_save.py",
        HOST,
        "data",
        _write_together="self._host.collect",
        _from_main="self._host.broadcast",
    ),
    # The visual tokenizer.
    **rows("beit3_ds/tasks/visual_tokenizer/task.py", DEVICES, BY_READING, after_step="evaluator.mesh.sum_over_data"),
    **rows(
        "beit3_ds/tasks/visual_tokenizer/codebook.py",
        HOST,
        BY_READING,
        mean_features="mesh.data_host.sum",
        gather_vectors="mesh.data_host.gather",
    ),
    **rows("beit3_ds/tasks/visual_tokenizer/code_usage.py", HOST, BY_READING, usage="mesh.data_host.sum"),
    # Processes of their own, whose tensors are on the device of the backend that they choose.
    **rows(
        "beit3_ds/cluster/check/link_worker.py",
        BOTH,
        BY_READING,
        __init__="dist.init_process_group",
        measure="self._dist.barrier",
        all_reduce="self._dist.barrier self._dist.all_reduce",
        _send_to="self._dist.send",
        _receive_from="self._dist.recv",
        _pass_number="self._dist.send",
        _receive_number="self._dist.recv",
    ),
    **rows("beit3_ds/cluster/check/links.py", (), BY_READING, describe_links="links.all_reduce"),  # a figure
    **rows("beit3_ds/benchmarks/step/parallel.py", HOST, BY_READING, run_steps="mesh.data_host.sum mesh.barrier"),
    **rows(
        "beit3_ds/benchmarks/checkpoint/ranks.py", HOST, BY_READING, row="self.mesh.barrier", save="rank.mesh.barrier"
    ),
}


def test_every_call_is_classified() -> None:
    """Catches a new call that is missing in the table, and a row whose call is gone."""
    found = set(find_calls())
    assert found - TABLE.keys() == set(), "say in TABLE what these send, and in which run that is seen"
    assert TABLE.keys() - found == set(), "these are no longer in the source"


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
    """Holds the result of one rank of a run."""

    status: int
    seen: dict[str, set[Site]]


def train(config: str, *, stops: bool = False) -> Outcome:
    """Runs a whole training; if `stops`, rank 1 is asked to stop after its first step."""
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
    """Checks that all ranks succeeded and that the run made all calls that the table lists for it."""
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes)
    for call, row in TABLE.items():
        if row.run == run:
            for kind in row.kinds:
                assert any((call.file, call.function) in outcome.seen[kind] for outcome in outcomes), (call, kind)


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] * (run != "data")) for run in RUNS])
def test_every_collective_is_of_hosts_or_of_devices(run: str, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Runs start, steps, evaluation, save, stop, resume and report with groups that refuse tensors on the wrong device.

    Before hosts had a group of their own no run of several ranks began: "No backend type associated with device type
    cpu". DeepSpeed's own collectives of these stages run here too.
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
    """Frees memory as ZeRO-3 does in a backward pass, where the emulation once named the host as its device."""
    leaf = torch.ones(2, device=DEVICE, requires_grad=True)
    freed: list[torch.Tensor] = []
    leaf.register_hook(lambda gradient: freed.append(torch.empty(0, device=leaf.device)))
    leaf.sum().backward()
    torch.autograd.backward(leaf.sum())
    torch.autograd.grad(leaf.sum(), leaf)
    assert [tensor.device for tensor in freed] == [DEVICE] * 3


def differ() -> tuple[dict[str, set[Site]], dict[str, str]]:
    """Makes the calls of ranks that differ or fail, and every mistake that the emulated machine must refuse."""
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
    """Shows that the emulated machine refuses mistakes; otherwise the runs above would show nothing."""
    for seen, refusals in run_ranks(differ, 2):
        assert refusals.keys() == MISTAKES.keys()
        assert "No backend type associated with device type cpu" in refusals["counts over devices"]
        check_seen("differing", [Outcome(0, seen)])

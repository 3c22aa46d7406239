"""Proves that DeepSpeed still needs the workarounds of `pipeline.deepspeed_compat` and `ModelParallelUnit`.

Each test undoes one workaround on the ranks. If it fails, a new DeepSpeed may no longer need the workaround. The proofs
run when a version, a workaround or this file changes (tests/deepspeed_proofs.py).
"""

import functools
import importlib.util
import inspect
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.training.layouts import Layout
from tests.training.steps import Reference, config_for, measure_steps

SECONDS = 8  # after which an expected hang is reported as an error
PATIENCE = 120  # where no hang is expected, on a busy machine
STAGES = Layout(1, 2, 1)
INTERLEAVED = Layout(1, 2, 1, interleaved=True)
# Two micro-batches: the first stage goes forward twice, then backward twice.
DEALS = [[[[0, 1, 2, 3], [4, 5, 6, 7]]]]
MODEL = "paper"


def undo_trace_check(patch: pytest.MonkeyPatch) -> None:
    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat

    patch.setattr(deepspeed_compat, "_compare_traces_among_data_parallel_ranks", lambda mesh: None)


def undo_clearing_of_marks(patch: pytest.MonkeyPatch) -> None:
    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat

    def backward(engine: Any, loss: torch.Tensor, *, is_last: bool) -> None:
        engine.set_gradient_accumulation_boundary(is_last)
        engine.backward(loss)

    patch.setattr(deepspeed_compat, "backward", backward)


def undo_zero3_norm(patch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat

    adapt_engine = deepspeed_compat.adapt_engine

    def adapt(engine: Any, mesh: Any) -> None:
        adapt_engine(engine, mesh)
        # Hangs, so soon rather than late.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SECONDS), mesh.model_parallel_group)
        engine.optimizer._get_norm_groups = DeepSpeedZeroOptimizer_Stage3._get_norm_groups.__get__(engine.optimizer)

    patch.setattr(deepspeed_compat, "adapt_engine", adapt)


def undo_model_parallel_group(patch: pytest.MonkeyPatch) -> None:
    """Uses Megatron's model-parallel group, which omits other stages; here it has a single rank."""
    from beit3_ds.parallel import ModelParallelUnit

    group = [dist.new_group([rank]) for rank in range(STAGES.num_ranks)][dist.get_rank()]
    patch.setattr(ModelParallelUnit, "get_model_parallel_group", lambda self: group)
    patch.setattr(ModelParallelUnit, "get_model_parallel_world_size", lambda self: 1)


def undo_clearing_of_buffer(patch: pytest.MonkeyPatch) -> None:
    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat

    patch.setattr(deepspeed_compat, "begin_step", lambda engine, num_chunks: None)


def let_engine_accumulate(patch: pytest.MonkeyPatch) -> None:
    """Passes the number of micro-batches to DeepSpeed as gradient accumulation."""
    from beit3_ds.config import RunConfig

    own = RunConfig.engine_config

    def engine_config(self: RunConfig, data_parallel_size: int) -> dict[str, Any]:
        values = own(self, data_parallel_size)
        steps = len(DEALS[0][0])
        per_micro_batch = values["train_micro_batch_size_per_gpu"] // steps
        return {
            **values,
            "train_batch_size": per_micro_batch * steps * data_parallel_size,
            "train_micro_batch_size_per_gpu": per_micro_batch,
            "gradient_accumulation_steps": steps,
        }

    patch.setattr(RunConfig, "engine_config", engine_config)


Undo = Callable[[pytest.MonkeyPatch], None]


def measure(
    layout: Layout,
    zero_stages: tuple[int, ...],
    undo: Undo | None,
    zero: dict[str, Any],
    reference: Reference,
    seconds: int,
) -> list[dict[str, float] | str]:
    """Returns each tensor's ratio of error to allowed error on one rank, or the exception that ended the step."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(config_for(0, **layout.parallel | {"timeout_seconds": seconds}).parallel)
    results: list[dict[str, float] | str] = []
    with pytest.MonkeyPatch.context() as patch:
        if undo is not None:
            undo(patch)
        for zero_stage in zero_stages:
            config = config_for(zero_stage, MODEL, **layout.parallel)
            config.deepspeed["zero_optimization"].update(zero)
            try:
                results.append(reference.ratios(measure_steps(config, mesh, DEALS, num_steps=2), MODEL))
            except RuntimeError:
                results.append(traceback.format_exc())
    return results


def run(
    layout: Layout,
    zero_stages: tuple[int, ...],
    undo: Undo | None,
    reference: Reference,
    zero: dict[str, Any] | None = None,
    seconds: int = PATIENCE,
) -> list[dict[str, float] | str]:
    """Runs one layout with a workaround undone.

    Returns:
        For each ZeRO stage, the worst error ratio over all ranks by kind and step, or the tracebacks of failed ranks.
    """
    ranks = run_ranks(measure, layout.num_ranks, layout, zero_stages, undo, zero or {}, reference, seconds)
    return [_worst(found) for found in zip(*ranks, strict=True)]


def _worst(ranks: tuple[dict[str, float] | str, ...]) -> dict[str, float] | str:
    failures = [found for found in ranks if isinstance(found, str)]
    if failures:
        return "\n".join(failures)
    worst: dict[str, float] = {}
    for ratios in ranks:
        assert not isinstance(ratios, str)
        for name, ratio in ratios.items():
            kind = " ".join(name.split(" ")[:2])
            worst[kind] = max(worst.get(kind, 0.0), ratio)
    return worst


def test_nothing_is_wrong_with_the_workarounds(reference: Reference) -> None:
    """Checks that no error occurs with all workarounds, so errors in other tests come from undone ones.

    The stages have different numbers of the small sub-groups.
    """
    for found in [
        *run(STAGES, (0, 1, 2, 3), None, reference, {"sub_group_size": 10_000}),
        *run(INTERLEAVED, (3,), None, reference),
    ]:
        assert isinstance(found, dict) and max(found.values()) <= 1, found


@pytest.mark.deepspeed_proof
def test_trace_check_asks_stages_that_hold_other_modules(reference: Reference) -> None:
    """Shows a hang: ZeRO-3 broadcasts its module order over all ranks while the other stage waits for a message."""
    (found,) = run(STAGES, (3,), undo_trace_check, reference, seconds=SECONDS)
    assert isinstance(found, str) and "in assert_ints_same_as_other_ranks" in found, found


@pytest.mark.deepspeed_proof
def test_backward_passes_in_a_row_overwrite_gradients(reference: Reference) -> None:
    (found,) = run(STAGES, (3,), undo_clearing_of_marks, reference, seconds=SECONDS)
    assert isinstance(found, str) or (found["loss 0"] <= 1 < 1e3 < found["gradient 0"]), found


@pytest.mark.deepspeed_proof
def test_engine_that_accumulates_divides_gradients(reference: Reference) -> None:
    """Shows gradients divided twice: loss factors already divide by the number of micro-batches.

    AdamW and clipping hide the second division.
    """
    for found in run(STAGES, (0, 3), let_engine_accumulate, reference):
        assert isinstance(found, dict) and found["gradient 0"] > 1e4 and found["norm 0"] > 1e4, found


@pytest.mark.deepspeed_proof
def test_zero3_norm_is_summed_sub_group_by_sub_group(reference: Reference) -> None:
    """Shows a hang: ranks sum the norm once per sub-group, but stages have different numbers of sub-groups."""
    (found,) = run(STAGES, (3,), undo_zero3_norm, reference, {"sub_group_size": 10_000}, SECONDS)
    assert isinstance(found, str) and "in get_grad_norm_direct" in found, found


@pytest.mark.deepspeed_proof
def test_model_parallel_group_holds_the_stages(reference: Reference) -> None:
    """Shows that each stage clips by its own norm if the group omits the other stages."""
    for found in run(STAGES, (1, 2), undo_model_parallel_group, reference):
        assert isinstance(found, dict) and found["gradient 0"] <= 1 < 1e3 < found["norm 0"], found


@pytest.mark.deepspeed_proof
def test_gradients_of_the_step_before_stay_in_the_buffer(reference: Reference) -> None:
    """Shows that gradients of some model chunks are added to those of the previous step.

    The chunks are those outside the first backward pass of a step.
    """
    (found,) = run(INTERLEAVED, (3,), undo_clearing_of_buffer, reference)
    assert isinstance(found, dict) and found["gradient 0"] <= 1 < 1e3 < found["gradient 1"], found


def measure_bf16_norms() -> tuple[float, float]:
    """Returns two gradient norms on one rank: with tensor-parallel gradients marked for DeepSpeed, and unmarked."""
    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat
    from beit3_ds.runtime.process_group import init_process_group

    layout = Layout(2, 1, 1)
    mesh = init_process_group(config_for(0, **layout.parallel).parallel)
    config = config_for(0, MODEL, bf16=True, **layout.parallel)
    norm = measure_steps(config, mesh, DEALS, num_steps=1)["norm 0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_compat, "begin_update", lambda engine: None)
        return float(norm), float(measure_steps(config, mesh, DEALS, num_steps=1)["norm 0"])


@pytest.mark.deepspeed_proof
def test_bf16_norm_without_zero_looks_for_marks_on_gradients(reference: Reference) -> None:
    expected = float(reference.load(MODEL)["norm 0"])
    for marked, unmarked in run_ranks(measure_bf16_norms, 2):
        assert marked == pytest.approx(expected, rel=0.005)
        assert unmarked < 0.98 * expected


def count_reductions() -> list[int]:
    """Returns how many gradient buffers a step without ZeRO copies on one rank, with and without the workaround."""
    from deepspeed import DeepSpeedEngine

    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat
    from beit3_ds.runtime.process_group import init_process_group

    config = config_for(0, MODEL)
    mesh = init_process_group(config.parallel)
    adapt_engine, copy = deepspeed_compat.adapt_engine, DeepSpeedEngine.allreduce_and_copy
    counts = []

    def undo(engine: Any, mesh: Any) -> None:
        adapt_engine(engine, mesh)
        engine.enable_backward_allreduce = True

    def count(engine: Any, *arguments: Any, **named: Any) -> None:
        counts[-1] += 1
        copy(engine, *arguments, **named)

    for adapt in (adapt_engine, undo):
        counts.append(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed_compat, "adapt_engine", adapt)
            patch.setattr(DeepSpeedEngine, "allreduce_and_copy", count)
            measure_steps(config, mesh, DEALS, num_steps=1)
    return counts


@pytest.mark.deepspeed_proof
def test_one_rank_copies_all_gradients_to_reduce_them() -> None:
    (counts,) = run_ranks(count_reductions, 1)
    assert counts == [0, 1]


def count_host_work() -> list[dict[str, int]]:
    """Counts what ZeRO-3's hooks do on the host in two steps of one rank, without the workaround and with it."""
    from deepspeed import comm
    from deepspeed.compile import z3_eager_fallback
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero import stage3

    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat
    from beit3_ds.runtime.process_group import init_process_group

    config = config_for(3, MODEL)
    mesh = init_process_group(config.parallel)
    counted = [
        (comm, "get_rank"),
        (torch.nn.Module, "named_parameters"),
        (z3_eager_fallback, "get_active_z3_eager_fallback"),
        (inspect, "_signature_from_function"),
        (stage3, "_unflatten_dense_tensors"),
    ]
    shorten, totals = deepspeed_compat.shorten_zero3_hooks, []
    for undone in (True, False):  # in this order, because the workaround changes modules for good
        for num_steps in (1, 3):
            totals.append(Counter[str]())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(deepspeed_compat, "shorten_zero3_hooks", (lambda optimizer: None) if undone else shorten)
                for owner, name in counted:
                    patch.setattr(owner, name, _counting(getattr(owner, name), totals[-1]))
                push = coordinator.get_accelerator().range_push
                patch.setattr(coordinator.get_accelerator(), "range_push", _counting(push, totals[-1]))
                measure_steps(config, mesh, DEALS, num_steps=num_steps)
    return [dict(three - one) for one, three in (totals[:2], totals[2:])]


def _counting(function: Any, calls: Counter[str]) -> Any:
    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls[function.__name__] += 1
        return function(*arguments, **named)

    return counted


@pytest.mark.deepspeed_proof
def test_hooks_of_zero3_take_long_on_the_host() -> None:
    ((undone, done),) = run_ranks(count_host_work, 1)
    assert len(undone) == 6
    assert all(10 * done.get(name, 0) < count for name, count in undone.items()), (undone, done)


def test_another_version_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    from beit3_ds.pipeline import deepspeed_compat as deepspeed_compat

    spec = importlib.util.spec_from_file_location("another_seams", str(deepspeed_compat.__file__))
    assert spec is not None and spec.loader is not None
    monkeypatch.setattr(deepspeed, "__version__", "0.0.1")
    with pytest.raises(ImportError, match=r"DeepSpeed 0\.0\.1 is installed, but .* pip install deepspeed=="):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

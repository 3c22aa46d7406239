"""Where this project relies on DeepSpeed's internals, or works around them; each has a test that fails without it.

The tested version is checked when this module is imported. What else must hold for DeepSpeed to be right is kept
elsewhere: the engine's own gradient accumulation is always 1 (`RunConfig.engine_config`), `ModelParallelUnit` tells it
over which ranks norms are summed, split parameters carry `tensor_model_parallel`, and every parameter of a run of
layers takes part in every micro-batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from beit3_ds.parallel import Mesh, is_split

TESTED_DEEPSPEED = "0.19.8"

if deepspeed.__version__ != TESTED_DEEPSPEED:
    raise ImportError(
        f"DeepSpeed {deepspeed.__version__} is installed, but beit3_ds was tested with {TESTED_DEEPSPEED} and relies "
        f"on its internals. Run: pip install deepspeed=={TESTED_DEEPSPEED}"
    )


def adapt_engine(engine: DeepSpeedEngine, mesh: Mesh) -> None:
    """Fits an engine that holds one stage's part of the model to the mesh."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        if mesh.data_parallel_size == 1:
            # Even for one rank it would copy all gradients into one buffer, add up nothing and copy them back.
            engine.enable_backward_allreduce = False
        # It would work out the norm that `clip_gradients` is given, and multiply even by 1.
        engine.clip_fp32_gradients = lambda: None
    _judge_gradients_by_norm(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.use_grad_accum_attribute:
        _keep_float32_sums(optimizer)
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return
    _compare_traces_among_data_parallel_ranks(mesh)
    optimizer._get_norm_groups = lambda: [_zero3_gradient_norm(optimizer, mesh)]


@contextmanager
def zero1_adds_up_in_float32() -> Iterator[None]:
    """Makes an engine built in this block use ZeRO's own optimizer for stage 1 in bf16 with float32 sums.

    DeepSpeed would choose its BF16_Optimizer, which also adds up in float32, but reduces gradients only after the last
    backward pass, in buckets of 500M elements: `overlap_comm` and `reduce_bucket_size` would have no effect.
    """
    chosen = DeepSpeedEngine._do_optimizer_sanity_check

    def choose(engine: DeepSpeedEngine, basic_optimizer: Any) -> Any:
        wrapper = chosen(engine, basic_optimizer)
        return ZERO_OPTIMIZATION if wrapper == BFLOAT16 and engine.zero_optimization() else wrapper

    DeepSpeedEngine._do_optimizer_sanity_check = choose
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = chosen


def _keep_float32_sums(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Keeps the float32 sums of gradients between the micro-batches of a step; updates clear them.

    ZeRO-1 would clear them before the next forward pass, together with its flags of a finished backward pass.
    """
    clear_marks = optimizer.clear_backward_seen_flag

    def clear_marks_alone() -> None:
        optimizer._epilogue_ran_this_backward = False
        clear_marks()

    optimizer.clear_backward_seen_flag = clear_marks_alone


def begin_step(engine: DeepSpeedEngine, num_chunks: int) -> None:
    """Prepares the gradients of a step whose backward passes go through `num_chunks` runs of layers, one at a time.

    The first backward pass of a step overwrites ZeRO-3's buffer of gradients, later ones add to it. A parameter that is
    not in the first one, because it belongs to another run, would add to what the step before left there.
    """
    if num_chunks > 1 and isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.grad_partitions_flat_buffer.zero_()


def backward(engine: DeepSpeedEngine, loss: Tensor, *, is_last: bool) -> None:
    """Runs one of a step's backward passes, whichever forward pass came last.

    ZeRO clears the marks of a finished backward pass at the beginning of a forward pass, which 1F1B does not always
    begin in between: gradients would go wrong, or the step fail with an unknown parameter type.

    Args:
        engine: with gradient accumulation 1.
        loss: scalar of the forward pass to go back through.
        is_last: whether it is the last backward pass of the step on this rank, with which ZeRO-0 and 1 reduce.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):
        engine.optimizer.clear_backward_seen_flag()
    engine.backward(loss)


def clip_gradients(engine: DeepSpeedEngine, norm: float) -> None:
    """Clips gradients in place to the engine's `gradient_clipping`, which without ZeRO the engine leaves to this.

    Args:
        engine: in float32 without ZeRO; other optimizers clip as they update.
        norm: of all gradients.
    """
    limit = engine.gradient_clipping()
    if limit and norm > limit:
        torch._foreach_mul_([p.grad for p in engine.module.parameters() if p.grad is not None], limit / norm)


def begin_update(engine: DeepSpeedEngine) -> None:
    """Marks the gradients of split parameters as the parameters are marked.

    In bf16 without ZeRO, DeepSpeed's optimizer looks for the mark on the gradients that it takes the norm of. Without
    it only tensor-parallel rank 0's parts would count.
    """
    for parameter in engine.module.parameters():
        if parameter.grad is not None and is_split(parameter):
            parameter.grad.tensor_model_parallel = True


def skip_update(engine: DeepSpeedEngine) -> None:
    """Drops a step's gradients and counts the step: what DeepSpeed's other optimizers do if the norm is not finite.

    Args:
        engine: in float32 without ZeRO.
    """
    engine.zero_grad()
    engine.global_steps += 1


def _judge_gradients_by_norm(optimizer: Any) -> None:
    """Makes the norm alone say whether an update is skipped: all ranks have the same one, and need it anyway.

    DeepSpeed also searches bf16 gradients for what is not finite: a second pass over them, and a message. With
    `bf16.check_grad_overflow` false it would do neither, and update with NaN.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = lambda partition_gradients=True: None
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.overflow_checker.check = lambda param_groups=None: False


def _zero3_gradient_norm(optimizer: DeepSpeedZeroOptimizer_Stage3, mesh: Mesh) -> Tensor:
    """The 2-norm of all gradients over all three axes; sends one element.

    DeepSpeed's own sums each of its sub-groups over the model-parallel ranks, and stages need not have as many.
    """
    counted = [
        gradient.float().norm() if isinstance(gradient, Tensor) else torch.tensor(gradient)
        for parameter, gradient in _gradient_partitions(optimizer)
        if is_split(parameter) or mesh.tensor.rank == 0
    ]
    squares = torch.zeros((), device=optimizer.device)
    for norm in counted:
        squares += norm.to(squares.device).square()
    # DeepSpeed keeps the norms of offloaded gradients on the host.
    total = mesh.host.sum(squares) if optimizer.offload_optimizer else mesh.sum_over_all(squares)
    return total.sqrt()


def _gradient_partitions(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[tuple[nn.Parameter, Tensor | float]]:
    """This rank's part of every parameter's gradient, or its norm where the gradient was offloaded."""
    for index, parameters in enumerate(optimizer.fp16_groups):
        if optimizer.offload_optimizer:
            norms = optimizer.norm_for_param_grads
            yield from ((p, float(norms.get(optimizer.get_param_id(p), 0.0))) for p in parameters)
        else:
            yield from zip(parameters, optimizer.averaged_gradients[index], strict=True)


def _compare_traces_among_data_parallel_ranks(mesh: Mesh) -> None:
    """ZeRO-3 compares the order of modules over all ranks, which hangs where stages hold different ones."""

    def check(values: Sequence[int]) -> None:
        if mesh.data_parallel_size == 1:
            return
        all_values = mesh.data_host.gather(list(values))
        if any(other != all_values[0] for other in all_values):
            raise RuntimeError(f"{mesh.coords}: data-parallel ranks ran different modules: {all_values}")

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = check

"""Contains the workarounds that depend on DeepSpeed's internals. Each workaround has a test that fails without it.

Importing this module checks DeepSpeed's version. Other modules meet DeepSpeed's further requirements:

    gradient accumulation   always 1 in the engine (`RunConfig.engine_config`)
    gradient norms          DeepSpeed sums them over the ranks that `ModelParallelUnit` names
    split parameters        have the attribute `tensor_model_parallel`
    micro-batches           use every parameter of a model chunk, and always compute gradients in the same order
"""

import functools
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
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from beit3_ds.model.block import Block
from beit3_ds.parallel import Mesh, is_split
from beit3_ds.pipeline.zero3_host_time import shorten_zero3_hooks

TESTED_DEEPSPEED = "0.19.8"

if deepspeed.__version__ != TESTED_DEEPSPEED:
    raise ImportError(
        f"DeepSpeed {deepspeed.__version__} is installed, but beit3_ds was tested with {TESTED_DEEPSPEED} and relies "
        f"on its internals. Run: pip install deepspeed=={TESTED_DEEPSPEED}"
    )


def gather_blocks_whole(model: nn.Module) -> None:
    """Makes ZeRO-3 gather all parameters of a block together, before its forward pass and before its backward pass.

    By default, DeepSpeed gathers the parameters of each linear layer and norm separately, in hooks that take longer
    than the kernels of small models. With whole blocks, one operator may also use the parameters of several layers of a
    block, because these parameters stay gathered throughout the block's forward pass and throughout its backward pass.
    """
    for module in model.modules():
        if isinstance(module, Block):
            set_z3_leaf_module(module, True)


def adapt_engine(engine: DeepSpeedEngine, mesh: Mesh) -> None:
    """Replaces some functions of the DeepSpeed engine, because they do not fit the mesh. For example, replaces the
    function for the gradient norm.
    """
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        if mesh.data_parallel_size == 1:
            # With one rank DeepSpeed would copy all gradients into one buffer and back, although nothing is reduced.
            engine.enable_backward_allreduce = False
        # DeepSpeed would compute the norm a second time, and would multiply gradients even by 1 (see `clip_gradients`).
        engine.clip_fp32_gradients = lambda: None
    _judge_gradients_by_norm(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.use_grad_accum_attribute:
        _keep_float32_sums(optimizer)
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return
    _compare_traces_among_data_parallel_ranks(mesh)
    shorten_zero3_hooks(optimizer)
    optimizer._get_norm_groups = lambda: [_zero3_gradient_norm(optimizer, mesh)]


@contextmanager
def zero1_adds_up_in_float32() -> Iterator[None]:
    """Makes DeepSpeed use ZeRO's own optimizer instead of BF16_Optimizer for engines built in the `with` block.

    For ZeRO-1 in bf16 with float32 sums of gradients, DeepSpeed chooses BF16_Optimizer. BF16_Optimizer ignores
    `overlap_comm` and `reduce_bucket_size`. ZeRO's own optimizer uses both settings, and adds up gradients in float32
    like BF16_Optimizer.
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
    """Keeps the float32 gradient sums between the micro-batches of a step; ZeRO-1 would clear them too early."""
    clear_marks = optimizer.clear_backward_seen_flag

    def clear_marks_alone() -> None:
        optimizer._epilogue_ran_this_backward = False
        clear_marks()

    optimizer.clear_backward_seen_flag = clear_marks_alone


def begin_step(engine: DeepSpeedEngine, num_chunks: int) -> None:
    """Clears ZeRO-3's gradient buffer at the start of a step, if the stage has several model chunks.

    Each chunk has its own part of the buffer. In the first backward pass of a step, ZeRO-3 overwrites the part of that
    pass's chunk. In all later backward passes, ZeRO-3 adds to the buffer. Without clearing, the parts of the other
    chunks would still contain the gradients of the previous step.

    Args:
        engine: DeepSpeed engine of this stage.
        num_chunks: number of model chunks of this stage. Each has its own backward pass.
    """
    if num_chunks > 1 and isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.grad_partitions_flat_buffer.zero_()


def backward(engine: DeepSpeedEngine, loss: Tensor, *, is_last: bool) -> None:
    """Runs one backward pass, even if no forward pass ran since the previous backward pass.

    ZeRO keeps flags during a backward pass, and clears them only when a forward pass starts. In 1F1B, backward passes
    may follow each other, so this function clears the flags.

    Args:
        engine: DeepSpeed engine with gradient accumulation 1.
        loss: scalar output of a forward pass.
        is_last: whether this is the step's last backward pass on this rank. In the last pass, ZeRO-0 and ZeRO-1 reduce
            gradients.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):
        engine.optimizer.clear_backward_seen_flag()
    engine.backward(loss)


def clip_gradients(engine: DeepSpeedEngine, norm: float) -> None:
    """Clips gradients in place to the engine's `gradient_clipping`.

    Args:
        engine: DeepSpeed engine in float32 without ZeRO; other engines clip in their update.
        norm: norm of all gradients.
    """
    limit = engine.gradient_clipping()
    if limit and norm > limit:
        torch._foreach_mul_([p.grad for p in engine.module.parameters() if p.grad is not None], limit / norm)


def begin_update(engine: DeepSpeedEngine) -> None:
    """Prepares an update: marks the gradients of split parameters as `tensor_model_parallel`, unless ZeRO is used.

    DeepSpeed needs this mark for the gradient norm in bf16 without ZeRO.
    """
    if engine.zero_optimization():
        return
    for parameter in engine.module.parameters():
        if parameter.grad is not None and is_split(parameter):
            parameter.grad.tensor_model_parallel = True


def skip_update(engine: DeepSpeedEngine) -> None:
    """Drops the gradients of a step whose gradient norm is not finite, and adds the step to `engine.global_steps`.

    DeepSpeed also adds a step to `global_steps` if one of its own optimizers skips the update.

    Args:
        engine: DeepSpeed engine in float32 without ZeRO.
    """
    engine.zero_grad()
    engine.global_steps += 1


def _judge_gradients_by_norm(optimizer: Any) -> None:
    """Makes the gradient norm alone decide whether an update is skipped, so that gradients are read only once."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = lambda partition_gradients=True: None
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.overflow_checker.check = lambda param_groups=None: False


def _zero3_gradient_norm(optimizer: DeepSpeedZeroOptimizer_Stage3, mesh: Mesh) -> Tensor:
    """Returns the 2-norm of all gradients over all ranks. All-reduces one element.

    DeepSpeed would call all-reduce once per sub-group of parameters. This could hang, because pipeline stages may have
    different numbers of sub-groups.
    """
    counted = [g for p, g in _gradient_partitions(optimizer) if is_split(p) or mesh.tensor.rank == 0]
    gradients = [gradient for gradient in counted if isinstance(gradient, Tensor)]
    norms = [*torch._foreach_norm(gradients, dtype=torch.float32)] if gradients else []
    norms += [torch.tensor(norm, device=optimizer.device) for norm in counted if not isinstance(norm, Tensor)]
    # The order of the sum affects the result, and golden losses are compared bit for bit.
    start = torch.zeros((), device=optimizer.device)
    squares = functools.reduce(torch.add, torch._foreach_mul(norms, norms) if norms else (), start)
    # DeepSpeed keeps the norms of offloaded gradients on the host.
    total = mesh.host.sum(squares) if optimizer.offload_optimizer else mesh.sum_over_all(squares)
    return total.sqrt()


def _gradient_partitions(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[tuple[nn.Parameter, Tensor | float]]:
    """Yields each parameter with this rank's part of the gradient, or with the norm of an offloaded gradient."""
    for index, parameters in enumerate(optimizer.fp16_groups):
        if optimizer.offload_optimizer:
            norms = optimizer.norm_for_param_grads
            yield from ((p, float(norms.get(optimizer.get_param_id(p), 0.0))) for p in parameters)
        else:
            yield from zip(parameters, optimizer.averaged_gradients[index], strict=True)


def _compare_traces_among_data_parallel_ranks(mesh: Mesh) -> None:
    """Makes ZeRO-3 compare the order of modules among data-parallel ranks only, instead of among all ranks.

    Ranks of different stages hold different modules.
    """

    def check(values: Sequence[int]) -> None:
        if mesh.data_parallel_size == 1:
            return
        all_values = mesh.data_host.gather(list(values))
        if any(other != all_values[0] for other in all_values):
            raise RuntimeError(f"{mesh.coords}: data-parallel ranks ran different modules: {all_values}")

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = check

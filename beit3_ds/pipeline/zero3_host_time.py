"""Reduces ZeRO-3's time on the host, without changing results. In small models, the GPU waits for the host.

DeepSpeed's hooks work parameter by parameter. This module replaces the slowest functions that the hooks call. Several
replacements process many parameters at once. The replacements do not support the DeepSpeed features that
`config.zero_keys` forbids, such as ZenFlow.
"""

import functools
import inspect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import nvtx
from torch import Tensor, nn

_read_parameter = parameter_offload.ZeROOrderedDict.__getitem__
"""DeepSpeed's function for reading a module's parameter; it gathers the parameter if it is partitioned."""


def shorten_zero3_hooks(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Replaces functions of ZeRO-3 that take long on the host. Some changes affect the whole process.

    Without these changes, DeepSpeed

    * walks over all modules of a block four times per step to list the block's parameters
    * asks torch several times per parameter for the rank and the number of ranks, although the parameter stores both
      numbers
    * formats debug messages that it does not print, and marks a range for NVIDIA's profiler around every function
    * computes the signature of an autograd function on each call of a module
    * copies each gradient twice before the reduction, and cuts each gradient into one tensor per rank
    * calls seven functions to release a parameter
    * after each update, sets each parameter's data to the memory that the data already use
    """
    nvtx.enable_nvtx = False
    for module in (partition_parameters, partitioned_param_coordinator, parameter_offload):
        module.print_rank_0 = _print_if_forced
    partition_parameters.debug_param2name_id_shape_device = lambda param: param.ds_id
    partition_parameters.Init._partition_world_size = lambda self, param: param.ds_zero_partition_world_size
    partitioned_param_coordinator.get_all_parameters = _list_parameters
    parameter_offload.ZeROOrderedDict.__getitem__ = _read_available_parameter
    optimizer._get_param_partition_rank = lambda param: param.ds_zero_partition_rank
    optimizer._unflatten_partitioned_parameters = lambda sub_group_id: None  # parts are views of the updated buffer
    optimizer.parameter_offload.param_coordinator.release_and_reset_all = _release_all
    _keep_signatures(optimizer.parameter_offload.module)
    _shorten_gradient_reduction(optimizer)


def _shorten_gradient_reduction(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    optimizer._assert_same_partition_group = lambda params: None  # all parameters have the same ranks
    if optimizer.reduce_scatter:
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = functools.partial(_add_to_bucket, optimizer)
        average = functools.partial(_average_gradients, optimizer)
        optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = average
    if not optimizer.offload_optimizer:
        optimizer.partition_grads = functools.partial(_keep_partitions, optimizer)


def _add_to_bucket(optimizer: DeepSpeedZeroOptimizer_Stage3, parameter: Any) -> None:
    """Adds a parameter's gradient to the bucket of gradients that are reduced together.

    If the bucket would become too large, the gradients already in the bucket are reduced first.
    """
    dtype = optimizer.get_param_comm_dtype(parameter)
    bucket = optimizer.ipg_buckets[dtype]
    if bucket.params and bucket.elements + parameter.ds_numel > optimizer.reduce_bucket_size:
        optimizer._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
    if not get_accelerator().resolves_data_dependency():
        optimizer.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())
    bucket.params.append(parameter)
    bucket.elements += parameter.ds_numel


def _average_gradients(
    optimizer: DeepSpeedZeroOptimizer_Stage3, parameters: Sequence[Any], dtype: torch.dtype
) -> list[Tensor]:
    """Averages each parameter's gradient over the ranks, and returns this rank's part of each average.

    Args:
        optimizer: ZeRO-3's optimizer.
        parameters: parameters whose gradients are reduced together.
        dtype: dtype in which gradients are sent.
    """
    gradients = [parameter.grad.to(dtype) for parameter in parameters]
    parts = _reduce_scatter(gradients, optimizer.dp_process_group, optimizer.ipg_buckets[dtype].buffer)
    return [part.to(optimizer.gradient_accumulation_dtype) for part in parts]


def _reduce_scatter(gradients: Sequence[Tensor], group: Any, buffer: Tensor | None) -> list[Tensor]:
    """Averages each gradient over the ranks, and returns this rank's part of each average. May overwrite the gradients.

    Reduce-scatters all gradients at once. Gradients are padded with zeros, so all ranks' parts have the same size.

    Args:
        gradients: gradients of one dtype.
        group: group of the ranks.
        buffer: memory for the joined gradients. If it is None or too small, new memory is allocated.
    """
    size = deepspeed.comm.get_world_size(group)
    parts = [_divide(gradient, size) for gradient in gradients]
    sums = parts[0]
    if len(parts) > 1:
        numel = sum(part.numel() for part in parts)
        out = None if buffer is None or buffer.numel() < numel else buffer[:numel].view(size, -1)
        sums = torch.cat(parts, dim=1, out=out)
    own = sums.div_(size)[deepspeed.comm.get_rank(group)]
    if size > 1:
        deepspeed.comm.reduce_scatter_fn(own, sums.view(-1), group=group)
    return list(own.split([part.size(1) for part in parts]))


def _divide(gradient: Tensor, size: int) -> Tensor:
    """Returns a gradient as one row per rank."""
    padding = -gradient.numel() % size
    padded = nn.functional.pad(gradient.reshape(-1), (0, padding)) if padding else gradient
    return padded.reshape(size, -1)


def _keep_partitions(
    optimizer: DeepSpeedZeroOptimizer_Stage3, parameters: Sequence[Any], partitions: list[Tensor]
) -> None:
    """Adds this rank's parts of the gradients to the step's sums, and sets the parameters' `grad` to None.

    The first micro-batch of a step overwrites the sums of the previous step.
    """
    kept = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    own = [kept[parameter.ds_id] for parameter in parameters]
    # DeepSpeed's number of the micro-batch is 0 for the first of a step, whose gradients replace the previous step's.
    accumulate = torch._foreach_copy_ if optimizer.micro_step_id == 0 else torch._foreach_add_
    accumulate(own, partitions)
    runs_ahead = not get_accelerator().is_synchronized_device()
    for parameter in parameters:
        if runs_ahead:
            parameter.grad.record_stream(get_accelerator().current_stream())
        parameter.grad = None


@torch.no_grad()
def _release_all(module: Any) -> None:
    """Frees all gathered parameters of a model."""
    arriving = module.ds_inflight_param_registry
    for handle in arriving.values():
        handle.wait()
    arriving.clear()
    for parameter in module.parameters():
        parameter.ds_active_sub_modules.clear()
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            free_param(parameter)


def _keep_signatures(model: nn.Module) -> None:
    """Stores the signatures of DeepSpeed's autograd functions, so that torch does not compute the signatures on each
    call.
    """
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if name in vars(module):
                forward = vars(module)[name].forward
                forward.__signature__ = inspect.signature(forward)


def _read_available_parameter(parameters: Any, name: str) -> nn.Parameter | None:
    """Returns a module's parameter. Only if the parameter is partitioned, it is gathered first."""
    parameter = dict.__getitem__(parameters, name)
    if getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE:
        return _read_parameter(parameters, name)
    return parameter


def _print_if_forced(message: str, debug: bool = False, force: bool = False) -> None:
    if (debug or force) and torch.distributed.get_rank() == 0:
        print(message)


def _list_parameters(module: Any, recurse: bool = False) -> Iterable[tuple[str, nn.Parameter]]:
    """Returns a module's parameters and its "external" parameters, which belong to other modules, all with names.

    The first call stores the list of the module's own parameters, because a module never gets or loses parameters. The
    list of external parameters is read on each call.
    """
    known = vars(module).setdefault("_listed_parameters", {})
    if recurse not in known:
        known[recurse] = list(module.named_parameters(recurse=recurse))
    return itertools.chain(known[recurse], module.ds_external_parameters())

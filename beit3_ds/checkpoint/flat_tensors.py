"""Finds the tensors that store the float32 weights in DeepSpeed's optimizers, for every ZeRO stage."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


class ParameterRange(NamedTuple):
    """A range of a parameter's elements, and the location of these elements in a flat tensor."""

    parameter: nn.Parameter
    start: int
    """Index of the range's first element in the flattened parameter."""
    position: int
    """Index of the range's first element in the flat tensor."""
    length: int
    """Number of elements in the range."""


def adamw_of(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the AdamW optimizer inside DeepSpeed's optimizer: torch's AdamW or apex's FusedAdam."""
    inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    assert isinstance(inner, torch.optim.Optimizer)
    known = isinstance(inner, torch.optim.AdamW) or type(inner).__name__ == "FusedAdam"
    assert known, f"checkpoints know AdamW's state, not that of {type(inner)}"
    return inner


def flat_tensors(optimizer: Any) -> Iterator[tuple[Tensor, list[ParameterRange]]]:
    """Yields each tensor that AdamW updates on this rank, with the parameter ranges in that tensor.

    Args:
        optimizer: the engine's optimizer: one of DeepSpeed's optimizers, or AdamW itself.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from zip(optimizer.fp32_partitioned_groups_flat, map(_zero3_ranges, optimizer.fp16_groups), strict=True)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        for group, weights in enumerate(optimizer.single_partition_of_fp32_groups):
            yield weights, _zero12_ranges(optimizer, group)
    elif isinstance(optimizer, BF16_Optimizer):
        yield from zip(optimizer.fp32_groups_flat_partition, map(_flat_ranges, optimizer.bf16_groups), strict=True)
    else:
        narrow = isinstance(optimizer, FP16_UnfusedOptimizer)
        groups = optimizer.fp16_groups if narrow else [group["params"] for group in optimizer.param_groups]
        masters = optimizer.fp32_groups if narrow else groups
        for parameters, weights in zip(groups, masters, strict=True):
            for parameter, weight in zip(parameters, weights, strict=True):
                yield weight, [ParameterRange(parameter, 0, 0, weight.numel())]


def _zero3_ranges(parameters: list[Any]) -> list[ParameterRange]:
    """Lists this rank's range of each parameter under ZeRO-3, without the padding on the last ranks."""
    ranges, position = [], 0
    for parameter in parameters:
        size = parameter.partition_numel()
        start = size * dist.get_rank(parameter.ds_process_group)
        length = max(0, min(size, parameter.ds_numel - start))
        ranges.append(ParameterRange(parameter, start, position, length))
        position += size
    return ranges


def _zero12_ranges(optimizer: DeepSpeedZeroOptimizer, group: int) -> list[ParameterRange]:
    """Lists the parameter ranges in this rank's share of a flattened parameter group under ZeRO-1 and 2.

    The ranges are computed from the flat buffer, because DeepSpeed's own mapping (`_hp_mapping`) ignores
    `round_robin_gradients`.
    """
    size = optimizer.partition_size[group]
    first = size * dist.get_rank(optimizer.real_dp_process_group[group])
    ranges = []
    offsets = zip(optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group], strict=True)
    for parameter, offset in offsets:
        start, stop = max(offset, first), min(offset + parameter.numel(), first + size)
        if start < stop:
            ranges.append(ParameterRange(parameter, start - offset, start - first, stop - start))
    return ranges


def _flat_ranges(parameters: list[Any]) -> list[ParameterRange]:
    """Lists the parameter ranges in this rank's share of a flattened group in DeepSpeed's BF16_Optimizer."""
    mapped = ((parameter, parameter._hp_mapping) for parameter in parameters)
    return [
        ParameterRange(parameter, own.lp_fragment_address.start, own.hp_fragment_address.start, own.lp_fragment.numel())
        for parameter, own in mapped
        if own is not None
    ]

"""The training state that a rank owns inside DeepSpeed's engine, as runs of elements of logical tensors.

A tensor's state is its float32 weight and AdamW's two moments. Parameters of a narrower type are the rounded weights,
so they are not saved: they are made again. Which elements a rank owns depends on the ZeRO stage: without ZeRO all of
its part of the model, with it a share of the flattened parameters (1 and 2) or of every parameter (3). This is the one
file of the package that knows DeepSpeed's optimizers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from beit3_ds.checkpoint.index import MOMENTS, WEIGHT
from beit3_ds.checkpoint.rectangles import Rectangle, own_block, run_of
from beit3_ds.checkpoint.state_check import HeldWeights, find_mismatch
from beit3_ds.parallel import Mesh, is_split, logical_shape

ReadPart = Callable[[str, str, Rectangle], Tensor]
"""Gives a kind of a tensor of a name: the rectangle, a matrix."""

_GATHERED_PARAMETERS = 4
"""Parameters that ZeRO-3's ranks gather per save for a comparison; a forward pass gathers all of them."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What tensor and pipeline parallelism leave of a logical tensor to this rank."""

    shape: torch.Size
    """Logical."""
    block: Rectangle
    """This rank's block of it."""


class Fragment(NamedTuple):
    """A run of elements whose state this rank owns; the tensors are the engine's own memory, one dimension each."""

    name: str
    """Logical name of the parameter."""
    start: int
    """First element, counted in this rank's block of the tensor."""
    weight: Tensor
    """float32."""
    optimizer_state: dict[str, Tensor]
    """AdamW's state of these elements, of each of `index.MOMENTS`."""

    def values(self, kind: str) -> Tensor:
        """The tensor of one of `index.KINDS`."""
        return self.weight if kind == WEIGHT else self.optimizer_state[kind]

    def cut(self, start: int, stop: int) -> "Fragment":
        """The elements [start, stop) of this run."""
        state = {kind: values[start:stop] for kind, values in self.optimizer_state.items()}
        return Fragment(self.name, self.start + start, self.weight[start:stop], state)


class EngineState:
    """Reads and writes an engine's training state without gathering anything."""

    def __init__(self, engine: DeepSpeedEngine, mesh: Mesh) -> None:
        """Finds the parameters of this rank.

        Args:
            engine: around this stage's part of the model, with AdamW (torch's, or apex's FusedAdam).
            mesh: the ranks.
        """
        self._engine, self._mesh = engine, mesh
        self._parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self.parts = {name: _find_part(parameter) for name, parameter in self._parameters.items()}
        """Of every parameter of this rank's stage, by its logical name."""

    @property
    def is_on_gpu(self) -> bool:
        """Whether the engine computes there; its state may still be offloaded to the host."""
        return self._engine.device.type == "cuda"

    @property
    def optimizer_step(self) -> int:
        """Updates that AdamW has counted, for its bias correction; 0 before the first."""
        steps = {float(state["step"]) for _, state in self._owners() if "step" in state}
        steps |= {float(group["step"]) for group in _adamw(self._engine.optimizer).param_groups if "step" in group}
        assert len(steps) <= 1, f"parameters were updated different numbers of times: {steps}"
        return int(steps.pop()) if steps else 0

    def fragments_to_save(self) -> list[Fragment]:
        """The runs that this rank writes, so that every element of every tensor is written by one rank.

        Without ZeRO the data-parallel ranks, which all hold everything, share it out; what tensor-parallel ranks hold
        alike, norms and positions, the first of them writes.
        """
        self._start_moments()
        return list(self._shares())

    def num_elements_to_save(self) -> int:
        """Elements of those runs."""
        return sum(len(share.weight) for share in self._shares())

    def _shares(self) -> Iterator[Fragment]:
        copies, number = self._mesh.data_parallel_size, self._mesh.data_parallel_rank
        if self._is_partitioned:
            copies, number = 1, 0
        for fragment in self._fragments():
            if is_split(self._parameters[fragment.name]) or self._mesh.tensor.rank == 0:
                size = len(fragment.weight)
                share = fragment.cut(size * number // copies, size * (number + 1) // copies)
                if len(share.weight):
                    yield share

    @torch.no_grad()
    def find_mismatch(self, step: int) -> str | None:
        """Compares what `fragments_to_save` gives with the parameters that the forward pass uses. All ranks call it.

        A checkpoint is assembled from DeepSpeed's flat buffers. An option that lays them out differently would make it
        garbage although training stays right. So samples of every parameter are compared, among the elements that this
        rank owns. Under ZeRO-3 a rank holds only its own partition, so a few parameters are also gathered, different
        ones at each step; the data-parallel ranks send all elements of these.

        Args:
            step: number of updates done; it chooses the samples, the same ones on all ranks.

        Returns:
            The first tensor that differs and the difference, in a few words; None if all are equal.
        """
        return find_mismatch(self._held_weights(step), step)

    def _held_weights(self, step: int) -> Iterator[HeldWeights]:
        """Yields every owned run with the model's own elements of it."""
        names = sorted(self._parameters)
        gathered = set(Random(step).sample(names, min(_GATHERED_PARAMETERS, len(names))))
        for fragment in self._fragments():
            parameter: Any = self._parameters[fragment.name]
            stop = fragment.start + len(fragment.weight)
            moments = tuple(fragment.optimizer_state.values())
            if not hasattr(parameter, "ds_tensor"):
                yield HeldWeights(
                    fragment.name, fragment.weight, parameter.data.view(-1)[fragment.start : stop], moments
                )
                continue
            own = parameter.ds_tensor.data.flatten()[: len(fragment.weight)]
            yield HeldWeights(fragment.name, fragment.weight, own, moments)
            if fragment.name in gathered:
                whole = _gather(parameter)
                yield HeldWeights(fragment.name, fragment.weight, whole[fragment.start : stop], moments)

    @torch.no_grad()
    def load(self, read: ReadPart, optimizer_step: int) -> None:
        """Overwrites weights and moments, reading no more than this rank holds. All ranks call it.

        Under ZeRO-3 the data-parallel ranks then gather the parameters that DeepSpeed keeps whole.

        Args:
            read: the source of all tensors of `parts`, float32.
            optimizer_step: updates that the moments come from.
        """
        self._load_weights(read, set(self._parameters))
        self._start_moments()
        adamw = _adamw(self._engine.optimizer)
        if isinstance(adamw, torch.optim.AdamW):
            for _, state in self._owners():
                state["step"].fill_(optimizer_step)
        else:  # FusedAdam counts by group
            for group in adamw.param_groups:
                group["step"] = optimizer_step
        for fragment in self._fragments():
            for kind in MOMENTS:
                self._fill(fragment, read, kind)

    @torch.no_grad()
    def load_weights(self, read: ReadPart, names: set[str]) -> None:
        """Overwrites the weights of some parameters, as `load` does, before the first update. All ranks call it."""
        assert self.optimizer_step == 0, "weights are replaced under moments that belong to others"
        self._load_weights(read, names & set(self._parameters))

    def rectangles(self, fragment: Fragment) -> Iterator[tuple[int, Rectangle]]:
        """Where a run lies in its logical tensor; see `run_of`. Its end may be padding, which lies nowhere."""
        start, stop = fragment.start, fragment.start + len(fragment.weight)
        return run_of(self.parts[fragment.name].block, start, stop)

    def _load_weights(self, read: ReadPart, wanted: set[str]) -> None:
        optimizer = self._engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer._partition_all_parameters()  # also those that are kept whole between steps
        for fragment in self._fragments():
            if fragment.name in wanted:
                self._fill(fragment, read)
                if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
                    shard = self._parameters[fragment.name].ds_tensor  # type: ignore[attr-defined]
                    shard.data.flatten()[: len(fragment.weight)].copy_(fragment.weight)
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            optimizer.invalidate_secondary_tensor()
        elif optimizer is not _adamw(optimizer):  # else AdamW updates the parameters themselves
            for name in wanted:
                self._fill(Fragment(name, 0, self._parameters[name].data.view(-1), {}), read)

    def _fill(self, fragment: Fragment, read: ReadPart, kind: str = WEIGHT) -> None:
        values = fragment.values(kind)
        for position, rectangle in self.rectangles(fragment):
            part = read(kind, fragment.name, rectangle)
            values[position : position + rectangle.num_elements].copy_(part.flatten())

    def _start_moments(self) -> None:
        """Makes what AdamW itself would make at the first update."""
        for weight, state in self._owners():
            if not state:
                if isinstance(_adamw(self._engine.optimizer), torch.optim.AdamW):
                    # The fused form wants the count on the device.
                    state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                state |= {kind: torch.zeros_like(weight, requires_grad=False) for kind in MOMENTS}

    @property
    def _is_partitioned(self) -> bool:
        return isinstance(
            self._engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer
        )

    def _owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The tensors that AdamW updates on this rank, each with its state, which is empty before the first update."""
        optimizer = self._engine.optimizer
        state = _adamw(optimizer).state
        for weights, _ in self._layout():
            yield weights, state[weights]

    def _fragments(self) -> Iterator[Fragment]:
        state = _adamw(self._engine.optimizer).state
        for weights, runs in self._layout():
            own = {kind: values.detach().flatten() for kind, values in state[weights].items() if kind in MOMENTS}
            flat = weights.detach().flatten()
            for parameter, start, position, length in runs:
                stop = position + length
                moments = {kind: values[position:stop] for kind, values in own.items()}
                yield Fragment(self._names[id(parameter)], start, flat[position:stop], moments)

    def _layout(self) -> Iterator[tuple[Tensor, list[tuple[nn.Parameter, int, int, int]]]]:
        """The tensors that AdamW updates, and the runs of parameters in each.

        A run is a parameter, its first element there, its position in the tensor, and its length.
        """
        optimizer = self._engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            yield from zip(optimizer.fp32_partitioned_groups_flat, map(_zero3_runs, optimizer.fp16_groups), strict=True)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            for group, weights in enumerate(optimizer.single_partition_of_fp32_groups):
                yield weights, _zero12_runs(optimizer, group)
        elif isinstance(optimizer, BF16_Optimizer):
            yield from zip(optimizer.fp32_groups_flat_partition, map(_flat_runs, optimizer.bf16_groups), strict=True)
        else:
            narrow = isinstance(optimizer, FP16_UnfusedOptimizer)
            groups = optimizer.fp16_groups if narrow else [group["params"] for group in optimizer.param_groups]
            masters = optimizer.fp32_groups if narrow else groups
            for parameters, weights in zip(groups, masters, strict=True):
                for parameter, weight in zip(parameters, weights, strict=True):
                    yield weight, [(parameter, 0, 0, weight.numel())]


def _adamw(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's AdamW, or apex's FusedAdam, which keeps the same moments but counts updates in its groups."""
    inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    assert isinstance(inner, torch.optim.Optimizer)
    known = isinstance(inner, torch.optim.AdamW) or type(inner).__name__ == "FusedAdam"
    assert known, f"checkpoints know AdamW's state, not that of {type(inner)}"
    return inner


def _find_part(parameter: nn.Parameter) -> Part:
    # Under ZeRO-3 the parameter itself may be empty.
    logical = logical_shape(parameter, getattr(parameter, "ds_shape", None))
    return Part(shape=logical, block=own_block(logical, getattr(parameter, "parallel_split", None)))


def _zero3_runs(parameters: list[Any]) -> list[tuple[nn.Parameter, int, int, int]]:
    """Every data-parallel rank has an equal share of each parameter; the last shares may end behind its end."""
    runs, position = [], 0
    for parameter in parameters:
        size = parameter.partition_numel()
        start = size * dist.get_rank(parameter.ds_process_group)
        runs.append((parameter, start, position, max(0, min(size, parameter.ds_numel - start))))
        position += size
    return runs


def _zero12_runs(optimizer: DeepSpeedZeroOptimizer, group: int) -> list[tuple[nn.Parameter, int, int, int]]:
    """Lists the parameters that have a piece in this rank's share of a flattened group.

    The order is that of the flat buffer, which `round_robin_gradients` and `parameter_alignment` change. DeepSpeed's
    own mapping of parameters (`_hp_mapping`) ignores `round_robin_gradients`.
    """
    size = optimizer.partition_size[group]
    first = size * dist.get_rank(optimizer.real_dp_process_group[group])
    runs = []
    places = zip(optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group], strict=True)
    for parameter, offset in places:
        start, stop = max(offset, first), min(offset + parameter.numel(), first + size)
        if start < stop:
            runs.append((parameter, start - offset, start - first, stop - start))
    return runs


def _gather(parameter: Any) -> Tensor:
    """Gathers a flat copy of a parameter that ZeRO-3 has partitioned; all its data-parallel ranks call it."""
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # kept whole between steps
        return parameter.data.flatten()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.flatten().clone()


def _flat_runs(parameters: list[Any]) -> list[tuple[nn.Parameter, int, int, int]]:
    """The parameters of which a piece lies in this rank's share of their flattened group."""
    return [
        (parameter, mapping.lp_fragment_address.start, mapping.hp_fragment_address.start, mapping.lp_fragment.numel())
        for parameter in parameters
        if (mapping := parameter._hp_mapping) is not None
    ]

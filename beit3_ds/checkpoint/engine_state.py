"""Reads and writes a rank's training state inside DeepSpeed's engine, as ranges of logical tensors.

A logical tensor is a whole tensor of the model, without any parallelism. Its state consists of the float32 weight,
AdamW's two moments and, if configured, a moving average of the weight.

The ZeRO stage determines which elements a rank owns. Without ZeRO, a rank owns all elements. Under ZeRO-1 and 2, it
owns a share of the flattened parameters, and under ZeRO-3 a share of every parameter. Only this file and `flat_tensors`
access DeepSpeed's optimizers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from beit3_ds.checkpoint.flat_tensors import adamw_of, flat_tensors
from beit3_ds.checkpoint.index import AVERAGE, KINDS, MOMENTS, WEIGHT
from beit3_ds.checkpoint.slices import BLOCK_ELEMENTS, TensorSlice, own_block, slice_range
from beit3_ds.checkpoint.state_check import HeldWeights, find_mismatch
from beit3_ds.checkpoint.weight_average import WeightAverage
from beit3_ds.parallel import Mesh, is_split, logical_shape

ReadSlice = Callable[[str, str, TensorSlice], Tensor]
"""Function that views a whole tensor as a matrix, and reads a slice of the matrix.

The function takes three arguments: a kind of values from `EngineState.kinds` (such as "exp_avg"), the name of the
tensor, and the slice.
"""

_GATHERED_PARAMETERS = 4
"""Number of parameters that ZeRO-3 ranks gather at each save, to compare them with the optimizer's weights."""


@dataclass(frozen=True, kw_only=True)
class LocalTensor:
    """Describes which block of a tensor this rank holds under tensor and pipeline parallelism."""

    shape: torch.Size
    """Shape of the whole tensor, without any parallelism."""
    block: TensorSlice
    """This rank's block of the tensor."""


class Fragment(NamedTuple):
    """Weights and optimizer state of consecutive elements of one tensor, as 1-D views of the engine's memory."""

    name: str
    """Name of the parameter in the whole model."""
    start: int
    """Index of the fragment's first element in this rank's block of the tensor, after the block is flattened."""
    weight: Tensor
    """Weights, (elements,) float32."""
    optimizer_state: dict[str, Tensor]
    """AdamW's moments "exp_avg" and "exp_avg_sq", and the moving "average" of the weights if configured; each
    (elements,)."""

    def values(self, kind: str) -> Tensor:
        """Returns the values of one kind, (elements,): weights, a moment or the average (`EngineState.kinds`)."""
        return self.weight if kind == WEIGHT else self.optimizer_state[kind]

    def cut(self, start: int, stop: int) -> "Fragment":
        """Returns the elements [start, stop) of this fragment as a new fragment."""
        state = {kind: values[start:stop] for kind, values in self.optimizer_state.items()}
        return Fragment(self.name, self.start + start, self.weight[start:stop], state)


class EngineState:
    """Reads and writes this rank's part of the training state in DeepSpeed's engine."""

    def __init__(self, engine: DeepSpeedEngine, mesh: Mesh, ema_decay: float | None = None) -> None:
        """Finds the parameters and buffers of this rank.

        Args:
            engine: DeepSpeed's engine for this pipeline stage, with AdamW (torch's AdamW, or apex's FusedAdam).
            mesh: the mesh of ranks.
            ema_decay: decay of the moving average of the weights; None computes no average.
        """
        self._engine, self._mesh = engine, mesh
        self._parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self.local_tensors = {name: _local_tensor(parameter) for name, parameter in self._parameters.items()}
        """This rank's block of every parameter in its pipeline stage, by the parameter's name in the whole model."""
        persistent = engine.module.state_dict().keys()
        self.buffers: dict[str, Tensor] = {
            name: buffer for name, buffer in engine.module.named_buffers() if name in persistent
        }
        """Persistent buffers of this pipeline stage, by name; equal on all data-parallel and tensor-parallel ranks."""
        self._average = None if ema_decay is None else WeightAverage(ema_decay, self._weights())

    @property
    def is_on_gpu(self) -> bool:
        """Returns whether the engine computes on a GPU, even if the optimizer state is offloaded to host memory."""
        return self._engine.device.type == "cuda"

    @property
    def optimizer_step(self) -> int:
        """Returns AdamW's count of updates, used for bias correction; 0 before the first update."""
        steps = {float(state["step"]) for _, state in self._owners() if "step" in state}
        steps |= {float(group["step"]) for group in adamw_of(self._engine.optimizer).param_groups if "step" in group}
        assert len(steps) <= 1, f"parameters were updated different numbers of times: {steps}"
        return int(steps.pop()) if steps else 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of values that are saved per element, as named in the files of checkpoints.

        They are "weight", "exp_avg", "exp_avg_sq" and, with `ema_decay`, "average".
        """
        return KINDS if self._average is None else (*KINDS, AVERAGE)

    def update_average(self) -> None:
        """Updates the moving average with the current weights; does nothing without `ema_decay`."""
        if self._average is not None:
            self._average.update(self._weights())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context manager that replaces the model's weights by their moving averages; does nothing without `ema_decay`.

        The `with` block must contain no update and no save. All ranks must enter and leave the block together. Under
        ZeRO, data-parallel ranks gather parameters at the start and at the end of the block.
        """
        if self._average is None:
            yield
            return
        self._average.swap(self._weights())
        self._refresh_parameters()
        try:
            yield
        finally:
            self._average.swap(self._weights())
            self._refresh_parameters()

    def fragments_to_save(self) -> list[Fragment]:
        """Returns the fragments of tensors that this rank saves.

        All ranks together save each element of each tensor once. Under ZeRO, each rank saves the elements that it owns.
        Without ZeRO, each data-parallel rank saves an equal share. Tensors that are equal on all tensor-parallel ranks
        are saved by tensor-parallel rank 0.
        """
        self._start_moments()
        return list(self._shares())

    def buffers_to_save(self) -> dict[str, Tensor]:
        """Returns the buffers that this rank saves, by name.

        The first rank of each pipeline stage saves all buffers of the stage. On other ranks, the result is empty.
        """
        is_first = self._mesh.data_parallel_rank == 0 and self._mesh.tensor.rank == 0
        return self.buffers if is_first else {}

    def num_elements_to_save(self) -> int:
        """Returns the total number of elements in the fragments that this rank saves (`fragments_to_save`)."""
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
        """Compares some of the optimizer's float32 weights with the model's parameters; all ranks call this method.

        The comparison detects DeepSpeed options that reorder the flat buffers. With such an option, training would be
        correct, but checkpoints would be wrong. Under ZeRO-3 the data-parallel ranks also gather a few parameters.

        Args:
            step: number of training steps so far; selects the weights to compare, and must be equal on all ranks.

        Returns:
            A short description of one tensor that differs; None if all compared weights are equal.
        """
        return find_mismatch(self._held_weights(step), step)

    def _held_weights(self, step: int) -> Iterator[HeldWeights]:
        """Yields pairs of equal ranges of weights: from the optimizer, and from the model's parameters. There is one
        pair per fragment of the optimizer's tensors.
        """
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
    def load(self, read: ReadSlice, optimizer_step: int) -> None:
        """Overwrites this rank's weights, moments and averages with values from `read`; all ranks call this method.

        Under ZeRO-3, each data-parallel rank reads its own part of every parameter. The ranks then all-gather the small
        parameters that DeepSpeed keeps whole on every rank.

        Args:
            read: function that returns a float32 slice of a tensor in `local_tensors`. It is called for the weights,
                moments and averages of the elements that this rank owns. Under ZeRO-1 and 2, and in bf16 without ZeRO,
                the optimizer and the model have separate copies of the weights. In these cases, `read` is also called
                for all weights in this rank's model.
            optimizer_step: AdamW's count of updates, used for bias correction.
        """
        self._load_weights(read, set(self._parameters))
        self._start_moments()
        adamw = adamw_of(self._engine.optimizer)
        if isinstance(adamw, torch.optim.AdamW):
            for _, state in self._owners():
                state["step"].fill_(optimizer_step)
        else:  # FusedAdam counts per group
            for group in adamw.param_groups:
                group["step"] = optimizer_step
        for fragment in self._fragments():
            for kind in fragment.optimizer_state:
                self._fill(fragment, read, kind)

    @torch.no_grad()
    def load_buffers(self, read: Callable[[str], Tensor]) -> None:
        """Overwrites the persistent buffers of this pipeline stage.

        Args:
            read: function that returns a buffer by name.
        """
        for name, buffer in self.buffers.items():
            buffer.copy_(read(name))

    @torch.no_grad()
    def load_weights(self, read: ReadSlice, names: set[str]) -> None:
        """Overwrites the weights of the parameters in `names`. All ranks call this method, before the first update.

        A moving average restarts from the new weights.

        Args:
            read: function that returns a float32 slice of a tensor in `local_tensors`.
            names: names of parameters; parameters of other pipeline stages are ignored.
        """
        assert self.optimizer_step == 0, "weights are replaced under moments that belong to others"
        self._load_weights(read, names & set(self._parameters))
        if self._average is not None:
            self._average.restart(self._weights())

    def slices(self, fragment: Fragment) -> Iterator[tuple[int, TensorSlice]]:
        """Yields the slices of a logical tensor that make up a fragment: the part of the tensor that this rank owns.
        Padding is omitted.

        A fragment contains up to three slices (`slice_range`).

        Yields:
            Pairs (position, slice), where position is the index in the fragment at which the slice starts.
        """
        start, stop = fragment.start, fragment.start + len(fragment.weight)
        return slice_range(self.local_tensors[fragment.name].block, start, stop)

    def _load_weights(self, read: ReadSlice, wanted: set[str]) -> None:
        optimizer = self._engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer._partition_all_parameters()  # also the parameters that ZeRO-3 keeps whole between steps
        for fragment in self._fragments():
            if fragment.name in wanted:
                self._fill(fragment, read)
                if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
                    shard = self._parameters[fragment.name].ds_tensor  # type: ignore[attr-defined]
                    shard.data.flatten()[: len(fragment.weight)].copy_(fragment.weight)
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._gather_persistent(optimizer)
        elif optimizer is not adamw_of(optimizer):  # else AdamW updates the parameters themselves
            for name in wanted:
                self._fill(Fragment(name, 0, self._parameters[name].data.view(-1), {}), read)

    @torch.no_grad()
    def _refresh_parameters(self) -> None:
        """Recomputes the parameters of the forward pass from the optimizer's float32 weights."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer._partition_all_parameters()
            for fragment in self._fragments():
                shard = self._parameters[fragment.name].ds_tensor  # type: ignore[attr-defined]
                shard.data.flatten()[: len(fragment.weight)].copy_(fragment.weight)
            self._gather_persistent(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
            optimizer.update_lp_params()
        elif optimizer is not adamw_of(optimizer):  # else AdamW updates the parameters themselves
            for fragment in self._fragments():
                self._parameters[fragment.name].data.view(-1).copy_(fragment.weight)

    def _gather_persistent(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        """All-gathers the changed shards of the parameters that ZeRO-3 keeps whole on every rank between steps."""
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def _fill(self, fragment: Fragment, read: ReadSlice, kind: str = WEIGHT) -> None:
        """Overwrites a fragment's values block by block, so that loading needs little extra memory."""
        values = fragment.values(kind)
        for position, part in self.slices(fragment):
            for block in part.blocks(BLOCK_ELEMENTS):
                stop = position + block.num_elements
                values[position:stop].copy_(read(kind, fragment.name, block).flatten())
                position = stop

    def _start_moments(self) -> None:
        """Creates missing AdamW moments as zeros, as AdamW itself does at the first update."""
        for weight, state in self._owners():
            if not state:
                if isinstance(adamw_of(self._engine.optimizer), torch.optim.AdamW):
                    # Fused AdamW needs the count on the device.
                    state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                state |= {kind: torch.zeros_like(weight, requires_grad=False) for kind in MOMENTS}

    @property
    def _is_partitioned(self) -> bool:
        return isinstance(
            self._engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer
        )

    def _owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yields each tensor that AdamW updates on this rank, and its optimizer state ({} before the first update)."""
        optimizer = self._engine.optimizer
        state = adamw_of(optimizer).state
        for weights, _ in flat_tensors(self._engine.optimizer):
            yield weights, state[weights]

    def _weights(self) -> list[Tensor]:
        """Returns the tensors that AdamW updates on this rank."""
        return [weights for weights, _ in flat_tensors(self._engine.optimizer)]

    def _fragments(self) -> Iterator[Fragment]:
        state = adamw_of(self._engine.optimizer).state
        for number, (weights, ranges) in enumerate(flat_tensors(self._engine.optimizer)):
            own = {kind: values.detach().flatten() for kind, values in state[weights].items() if kind in MOMENTS}
            if self._average is not None:
                own[AVERAGE] = self._average.tensors[number].flatten()
            flat = weights.detach().flatten()
            for parameter, start, position, length in ranges:
                stop = position + length
                moments = {kind: values[position:stop] for kind, values in own.items()}
                yield Fragment(self._names[id(parameter)], start, flat[position:stop], moments)


def _local_tensor(parameter: nn.Parameter) -> LocalTensor:
    # Under ZeRO-3 the parameter itself may be empty.
    logical = logical_shape(parameter, getattr(parameter, "ds_shape", None))
    return LocalTensor(shape=logical, block=own_block(logical, getattr(parameter, "parallel_split", None)))


def _gather(parameter: Any) -> Tensor:
    """All-gathers a parameter that ZeRO-3 partitions, and returns it flattened; all data-parallel ranks call it."""
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # ZeRO-3 keeps it whole between steps
        return parameter.data.flatten()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.flatten().clone()

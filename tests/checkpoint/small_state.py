"""Builds a training state of a few tensors, and a store that saves it hundreds of times per second."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_ds.checkpoint.engine_state import Fragment, LocalTensor, ReadSlice
from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import KINDS, MOMENTS, WEIGHT
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.slices import TensorSlice, slice_range, whole_slice
from beit3_ds.checkpoint.store import CheckpointStore
from beit3_ds.parallel import Mesh

SHAPES = {"embedding.weight": torch.Size((7, 3)), "norm.weight": torch.Size((5,)), "scale": torch.Size(())}
TIMEOUT_SECONDS = 20.0


def values_at(step: int, kind: str, name: str) -> Tensor:
    """Returns the values of a tensor after `step` updates; no two tensors have a value in common."""
    start = 10_000 * step + 1000 * KINDS.index(kind) + 100 * list(SHAPES).index(name)
    return torch.arange(start, start + SHAPES[name].numel(), dtype=torch.float32).view(SHAPES[name])


def buffer_at(step: int, name: str) -> Tensor:
    """Returns the values of a buffer after `step` updates."""
    return torch.tensor(bool(step)) if name == "codes.started" else torch.arange(6.0).view(3, 2) + 10 * step


class SmallState:
    """Replaces `EngineState` in a store; every rank owns an equal range of each tensor."""

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self.local_tensors = {
            name: LocalTensor(shape=shape, block=whole_slice(shape)) for name, shape in SHAPES.items()
        }
        self.optimizer_step = 0
        self.buffers = {"codes.weight": torch.zeros(3, 2), "codes.started": torch.tensor(False)}
        self._values = {(kind, name): torch.zeros(shape) for kind in KINDS for name, shape in SHAPES.items()}

    def train_to(self, step: int) -> "SmallState":
        """Overwrites all tensors in place, as an optimizer does."""
        self.optimizer_step = step
        for (kind, name), values in self._values.items():
            values.copy_(values_at(step, kind, name))
        for name, buffer in self.buffers.items():
            buffer.copy_(buffer_at(step, name))
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS

    @property
    def is_on_gpu(self) -> bool:
        return False

    def num_elements_to_save(self) -> int:
        return sum(len(fragment.weight) for fragment in self.fragments_to_save())

    def fragments_to_save(self) -> list[Fragment]:
        fragments = []
        for name, shape in SHAPES.items():
            moments = {kind: self._values[kind, name].view(-1) for kind in MOMENTS}
            fragment = Fragment(name, 0, self._values[WEIGHT, name].view(-1), moments)
            start, stop = (shape.numel() * rank // self._num_ranks for rank in (self._rank, self._rank + 1))
            fragments.append(fragment.cut(start, stop))
        return [fragment for fragment in fragments if len(fragment.weight)]

    def buffers_to_save(self) -> dict[str, Tensor]:
        return self.buffers if self._rank == 0 else {}

    def load_buffers(self, read: Callable[[str], Tensor]) -> None:
        for name, buffer in self.buffers.items():
            buffer.copy_(read(name))

    def find_mismatch(self, step: int) -> str | None:
        return None

    def slices(self, fragment: Fragment) -> Iterator[tuple[int, TensorSlice]]:
        return slice_range(
            self.local_tensors[fragment.name].block, fragment.start, fragment.start + len(fragment.weight)
        )

    def load(self, read: ReadSlice, optimizer_step: int) -> None:
        self.optimizer_step = optimizer_step
        for (kind, name), values in self._values.items():
            values.copy_(read(kind, name, whole_slice(SHAPES[name])).view(SHAPES[name]))

    def tensors(self) -> list[Tensor]:
        """Returns weights and moments."""
        return list(self._values.values())

    def check_is_of(self, step: int) -> None:
        """Checks that every element has the value it should have after `step` updates."""
        assert self.optimizer_step == step
        for (kind, name), values in self._values.items():
            assert torch.equal(values, values_at(step, kind, name)), (step, kind, name)
        for name, buffer in self.buffers.items():
            assert torch.equal(buffer, buffer_at(step, name)), (step, name)


def describe(**changes: Any) -> RunDescription:
    """Describes the run that saves these states; `changes` replace fields."""
    plain: dict[str, Any] = {
        "model": {"hidden_size": 3, "num_layers": 1, "drop_path_rate": 0.1},
        "config": {"training": {"seed": 1}},
        "tokenizers": {"text": "ab" * 32, "visual": "cd" * 32},
        "layout": "small",
        "versions": {"python": "3"},
    }
    return RunDescription(**plain | changes)


class SmallRun:
    """Builds a store and its state, like a process that has just started."""

    def __init__(self, root: Path, keep: int = 2, mesh: Mesh | None = None, **changes: Any) -> None:
        mesh = mesh or Mesh()
        self.state = SmallState(mesh.data_parallel_rank, mesh.num_ranks)
        self.store = CheckpointStore(root, keep, mesh, describe(**changes), TIMEOUT_SECONDS)

    def save(self, *steps: int) -> list[str | None]:
        """Trains to each of the steps and saves; returns the error of each save, or None."""
        for step in steps:
            self.store.save(self.state.train_to(step), step)
        self.store.finish()
        return [outcome.error for outcome in self.store.take_outcomes()]

    def resume(self) -> int | None:
        """Loads the newest whole checkpoint and checks its content; returns its step, or None if there is none."""
        newest = self.store.agree_on_newest()
        if newest is None:
            return None
        step = self.store.load(self.state, newest)
        self.state.check_is_of(step)
        return step


def check_holds(folder: Path, step: int) -> None:
    """Checks that a checkpoint's folder holds the state of the given step."""
    checkpoint, state = CheckpointFolder(folder), SmallState()
    assert checkpoint.step == step
    assert checkpoint.find_damage(checkpoint.index.files) is None
    state.load(checkpoint.read_kind, checkpoint.index.optimizer_step)
    state.load_buffers(checkpoint.read_buffer)
    state.check_is_of(step)
    checkpoint.close()

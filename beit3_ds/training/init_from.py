"""Initializes a run with the weights of another run."""

import re
from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.config import RunConfig
from beit3_ds.model.adaptation import AdaptedWeights
from beit3_ds.model.pretrained import PretrainedWeights, check_task
from beit3_ds.tasks import build_task


class InitialWeights:
    """Adapts the weights of a file to a run's model.

    The module `model.adaptation` lists the settings in which the stored model and the run's model may differ.
    """

    def __init__(self, path: str | Path, config: RunConfig) -> None:
        """Reads the names and shapes of the tensors, and checks them against the model.

        Args:
            path: file or folder written by `beit3 export` or `beit3 import`.
            config: the run's configuration. Its seed gives the initial values of tensors that the file lacks.

        Raises:
            ConfigError: if the weights cannot be read, belong to another task, or cannot be adapted to the model.
        """
        where, seed = f"training.init_from={path}", config.training.seed
        stored = PretrainedWeights(path)
        check_task(stored.task, config.task.name, where)
        self.weights = AdaptedWeights(stored, config.model, where, seed=seed)
        with torch.device("meta"):
            wanted = {name: parameter.shape for name, parameter in build_task(config).build_model().named_parameters()}
        self.absent = self.weights.check(wanted)
        """Names of the head and final-norm parameters that the file lacks, which keep their initial values."""

        has_heads = not any(name.startswith("heads.") for name in self.absent)
        self.task = stored.task if has_heads else None
        """Name and settings of the task whose head the file provides; None if the head keeps its initial values."""
        self._names = wanted.keys() - set(self.absent)

    def load(self, state: EngineState) -> None:
        """Replaces initial values in the engine with the stored weights.

        All ranks must call this method; each rank reads its own part.
        """
        state.load_weights(self._read, self._names)

    def describe(self) -> str:
        """Returns one line that names the file, the adaptations and the parameters that keep initial values."""
        notes = list(self.weights.changes)
        if self.absent:
            modules = dict.fromkeys(re.sub(r"\.(weight|bias)(_\w+)?$", "", name) for name in self.absent)
            notes.append(f"initial values for {', '.join(modules)}")
        if self.task is not None:
            notes.append(f"with the head of {self.task['name']}")
        return "; ".join([f"starts from the weights of {self.weights.path}", *notes])

    def _read(self, kind: str, name: str, part: TensorSlice) -> Tensor:
        return self.weights.read(name, part).float()


def open_initial_weights(config: RunConfig) -> InitialWeights | None:
    """Opens the weights of `training.init_from`, or returns None if it is not set.

    Raises:
        ConfigError: if the weights cannot be read, belong to another task, or cannot be adapted to the model.
    """
    path = config.training.init_from
    return InitialWeights(path, config) if path else None

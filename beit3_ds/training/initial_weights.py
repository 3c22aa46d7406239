"""Beginning a run with weights that another one made."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.rectangles import Rectangle
from beit3_ds.checkpoint.run_description import check_same_model
from beit3_ds.config import ModelConfig, RunConfig
from beit3_ds.model import BEiT3
from beit3_ds.model.pretrained import EXTRA_PREFIX, PretrainedWeights, check_tensors


class InitialWeights:
    """Weights of a file that fit the model of a run; positions are interpolated to its size of images."""

    def __init__(self, path: str | Path, model: ModelConfig) -> None:
        """Reads names and shapes.

        Args:
            path: a file or folder that `beit3 export` or `beit3 import` wrote.
            model: of the run.

        Raises:
            ConfigError: if it cannot be read, or holds another model.
        """
        self.weights = PretrainedWeights(path, image_size=model.image_size)
        check_same_model(
            dataclasses.asdict(model),
            dataclasses.asdict(self.weights.model),
            f"training.initial_weights={path}",
            "Set the model section to that of the weights (`beit3 inspect` prints it), or name other weights.",
        )
        with torch.device("meta"):
            wanted = {name: parameter.shape for name, parameter in BEiT3(model).named_parameters()}
        self._names = {name for name in self.weights.names() if not name.startswith(EXTRA_PREFIX)}
        self.absent = check_tensors(str(path), {name: self.weights.shape(name) for name in self._names}, wanted)
        """Tensors of the final norm and the heads that the file lacks; they keep their initial values."""

    def load(self, state: EngineState) -> None:
        """Overwrites the engine's initial values; every rank reads what it holds. All ranks call it."""
        state.load_weights(self._read, self._names)

    def describe(self) -> str:
        """What the run begins with, on one line."""
        absent = f"; initial values are left to {', '.join(self.absent)}" if self.absent else ""
        return f"begins with the weights of {self.weights.path}{absent}"

    def _read(self, kind: str, name: str, part: Rectangle) -> Tensor:
        return self.weights.read(name, part).float()


def open_initial_weights(config: RunConfig) -> InitialWeights | None:
    """The weights that `training.initial_weights` names, if any.

    Raises:
        ConfigError: if they cannot be read, or are those of another model.
    """
    path = config.training.initial_weights
    return InitialWeights(path, config.model) if path else None

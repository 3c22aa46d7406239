"""Reads the recorded inputs and outputs of the reference's fine-tuned models in `tests/fixtures/golden`."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.model import PretrainedWeights, TaskModel
from beit3_ds.model.adaptation import AdaptedWeights, fill_parameters
from beit3_ds.model.features import pack_inputs
from beit3_ds.weights import unilm_names
from beit3_ds.weights.export import export_weights
from beit3_ds.weights.released import ReleasedFile
from beit3_ds.weights.unilm_heads import head_builder

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden"
HEAD_SIZE = 16
"""Width of the models' attention heads, which the files do not state; released models have 64."""
CPU = torch.device("cpu")


class Golden(NamedTuple):
    """Holds weights, inputs and outputs of one model."""

    weights: dict[str, Tensor]
    """State dict of the released file."""
    inputs: dict[str, Tensor]
    """Inputs by name."""
    outputs: dict[str, Tensor]
    """Outputs of the reference, by name."""

    def texts(self) -> list[Tensor]:
        """Returns the ids of each text, without padding."""
        return [ids[padding == 0] for ids, padding in zip(self.inputs["ids"], self.inputs["padding"], strict=True)]


def read_golden(name: str) -> Golden:
    tensors = load_file(FOLDER / f"{name}.safetensors")
    parts = (
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in ("weights.", "in.", "out.")
    )
    return Golden(*parts)


def import_golden(golden: Golden, folder: Path, monkeypatch) -> PretrainedWeights:  # type: ignore[no-untyped-def]
    """Imports the state dict of a released file like `beit3 import`."""
    monkeypatch.setattr(unilm_names, "_HEAD_SIZE", HEAD_SIZE)
    torch.save({"model": golden.weights}, folder / "released.pth")
    export_weights(ReleasedFile(folder / "released.pth"), folder / "imported.safetensors")
    return PretrainedWeights(folder / "imported.safetensors")


def load_model(weights: PretrainedWeights) -> TaskModel:
    """Builds the model for imported weights, with the head of their task."""
    assert weights.task is not None
    model = TaskModel(head_builder(weights.task), weights.model)
    fill_parameters(model, AdaptedWeights(weights, weights.model, "golden"))
    return model.eval()


def pack_golden(model: TaskModel, images: Tensor, texts: list[Tensor]) -> PackedBatch:
    """Packs images and their texts as pairs."""
    return pack_inputs(model.config, None, None, (images, texts), CPU)

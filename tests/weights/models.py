"""Builds models in which every parameter matters, readers of their tensors, and random inputs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.config import ModelConfig
from beit3_ds.model import BEiT3, Features
from beit3_ds.model.pretrained import matrix_part
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights.export import export_weights


class ModelReader:
    """Reads the tensors of a model in memory, like those of a pretraining checkpoint."""

    def __init__(self, model: BEiT3, step: int = 0) -> None:
        self.model, self.step, self.task = model.config, step, {"name": "pretraining"}
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> torch.Size:
        return self._parameters[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._parameters[name].dtype

    def read(self, name: str, part: TensorSlice | None = None) -> Tensor:
        tensor = self._parameters[name]
        return tensor if part is None else matrix_part(tensor, part)


@torch.no_grad()
def random_model(config: ModelConfig, seed: int = 0) -> BEiT3:
    """Builds a model whose parameters all differ, including norms and biases."""
    model, generator = PretrainingModel(config), torch.Generator().manual_seed(seed)
    deviation = min(0.2, config.hidden_size**-0.5)  # rounding errors of larger ones grow from block to block
    for name, parameter in model.named_parameters():
        parameter.normal_(0, deviation, generator=generator)
        if "norm.weight" in name:
            parameter += 1
    return model.eval()


def exported(model: BEiT3, path: Path) -> Path:
    """Exports a model's weights in this project's format; returns the path."""
    export_weights(ModelReader(model), path)
    return path


def random_inputs(
    config: ModelConfig,
    num_images: int = 2,
    text_lengths: Sequence[int] = (5, 2),
    caption_lengths: Sequence[int] = (3,),
) -> tuple[Tensor, list[Tensor], tuple[Tensor, list[Tensor]]]:
    """Returns random inputs of `BEiT3.encode`."""
    generator = torch.Generator().manual_seed(7)
    shape = (3, config.image_size, config.image_size)

    def ids(lengths: Sequence[int]) -> list[Tensor]:
        return [torch.randint(0, config.text_vocab_size, (length,), generator=generator) for length in lengths]

    images = torch.rand(num_images, *shape, generator=generator) * 2 - 1
    pair_images = torch.rand(len(caption_lengths), *shape, generator=generator) * 2 - 1
    return images, ids(text_lengths), (pair_images, ids(caption_lengths))


def assert_features_equal(ours: Features, theirs: Features, tolerance: float) -> None:
    """Compares all kinds of features."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)

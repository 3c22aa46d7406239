"""Loads only the trained weights that images, pairs or texts need, on one device and in evaluation mode."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from beit3_ds.config import ConfigError, InputKind, ModelConfig
from beit3_ds.model import BEiT3, Head, TaskModel
from beit3_ds.parallel import TensorParallel
from beit3_ds.weights.reader import OpenedWeights, open_weights
from beit3_ds.weights.timm_file import TimmFile


class LoadOptions(TypedDict, total=False):
    """Holds the options that all `from_pretrained` methods share."""

    device: torch.device | str
    """Device of the model and of the results; default: the CPU."""
    dtype: torch.dtype
    """Dtype of the parameters and of the computation; default: float32."""
    image_size: int
    """Side of the images in pixels; positions are interpolated. By default the size in the weights."""
    max_text_length: int
    """Maximum tokens of a text, BOS and EOS included; longer texts are cut off. By default the length in the
    weights."""


def load_backbone(path: str | Path, inputs: Sequence[InputKind], **options: Unpack[LoadOptions]) -> BEiT3:
    """Loads the experts that given inputs need, without a head.

    Args:
        path: exported, imported or released weights, a checkpoint, or a run's output folder.
        inputs: inputs that the model must accept: "images", "pairs" or "texts".
        options: options of loading (`LoadOptions`).

    Raises:
        ConfigError: if the weights cannot be read, or lack what the inputs need.
    """
    weights = open_weights(path)
    if isinstance(weights, TimmFile) and tuple(inputs) != ("images",):
        raise ConfigError(f"{path} holds a vision tower alone, without the experts of texts. Load a VisionEncoder.")
    model = BEiT3.from_weights(weights, BEiT3, _settings(inputs, options), **_placement(options))
    return model.requires_grad_(False)


def load_with_head(
    weights: OpenedWeights,
    inputs: Sequence[InputKind],
    build_head: Callable[[ModelConfig, TensorParallel], Head],
    **options: Unpack[LoadOptions],
) -> TaskModel:
    """Loads the experts that given inputs need, and a task's head.

    Args:
        weights: the weights.
        inputs: inputs that the model must accept: "images", "pairs" or "texts".
        build_head: function that builds the head from the model's sizes and its tensor-parallel group.
        options: options of loading (`LoadOptions`).

    Raises:
        ConfigError: if the weights lack what the inputs need.
    """

    def build(config: ModelConfig) -> TaskModel:
        return TaskModel(build_head, config)

    settings = _settings(inputs, options)
    return TaskModel.from_weights(weights, build, settings, **_placement(options)).requires_grad_(False)


def open_with_head(path: str | Path, tensor: str, use: str) -> OpenedWeights:
    """Opens weights, and checks that they contain the head with a given tensor.

    Args:
        path: exported, imported or released weights, a checkpoint, or a run's output folder.
        tensor: name of a tensor of the head.
        use: what the head does, for the message.

    Raises:
        ConfigError: if the weights cannot be read or do not hold the head.
    """
    weights = open_weights(path)
    if tensor not in weights.names():
        task = "pretraining" if weights.task is None else weights.task["name"]
        raise ConfigError(
            f"{path}: these are weights of the task {task}, without a head that {use} ({tensor}). Name weights that "
            "were fine-tuned for this."
        )
    return weights


def _settings(inputs: Sequence[InputKind], options: LoadOptions) -> dict[str, object]:
    sizes = {name: options.get(name) for name in ("image_size", "max_text_length")}
    return {"inputs": tuple(inputs), **sizes}


class _Placement(TypedDict, total=False):
    device: torch.device | str
    dtype: torch.dtype


def _placement(options: LoadOptions) -> _Placement:
    placement: _Placement = {}
    if "device" in options:
        placement["device"] = options["device"]
    if "dtype" in options:
        placement["dtype"] = options["dtype"]
    return placement

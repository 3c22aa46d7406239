"""Loads trained weights for inference; reads only the weights for the chosen kinds of input, such as images."""

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
    """Options of all `from_pretrained` methods."""

    device: torch.device | str
    """Device of the model and the results; default: CPU."""
    dtype: torch.dtype
    """Dtype of the parameters and the computation; default: float32."""
    image_size: int
    """Side of the images in pixels; position embeddings are interpolated to this size. Default: the size stored with
    the weights."""
    max_text_length: int
    """Maximum tokens per text, including BOS and EOS; longer texts are truncated. Default: the length stored with the
    weights."""


def load_backbone(path: str | Path, inputs: Sequence[InputKind], **options: Unpack[LoadOptions]) -> BEiT3:
    """Loads a model without a head, with only the experts that the given inputs need.

    Args:
        path: exported, imported or released weights, a checkpoint, or a run's output folder.
        inputs: inputs that the model must accept: "images", "pairs" or "texts".
        options: device, dtype and sizes (`LoadOptions`).

    Raises:
        ConfigError: if the weights cannot be read, or lack tensors that the inputs need.
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
    """Loads a model with a task head. Skips the experts that the given inputs do not need.

    Args:
        weights: the opened weights.
        inputs: inputs that the model must accept: "images", "pairs" or "texts".
        build_head: function that builds the head from the model's config and tensor-parallel group.
        options: device, dtype and sizes (`LoadOptions`).

    Raises:
        ConfigError: if the weights lack tensors that the inputs need.
    """

    def build(config: ModelConfig) -> TaskModel:
        return TaskModel(build_head, config)

    settings = _settings(inputs, options)
    return TaskModel.from_weights(weights, build, settings, **_placement(options)).requires_grad_(False)


def open_with_head(path: str | Path, tensor: str, use: str) -> OpenedWeights:
    """Opens weights and checks that they contain a head, recognised by one tensor.

    Args:
        path: exported, imported or released weights, a checkpoint, or a run's output folder.
        tensor: name of a tensor in the head.
        use: purpose of the head for the error message, such as "answers questions".

    Raises:
        ConfigError: if the weights cannot be read, or do not contain the head.
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

"""Loads pretrained networks from timm, open_clip or transformers as teachers of the visual tokenizer."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.config import ConfigError, TeacherConfig
from beit3_ds.tokenizers.weights import load_weights

_PACKAGES = {"timm": "timm", "open_clip": "open_clip_torch", "transformers": "transformers"}


@dataclass(frozen=True, kw_only=True)
class _Network:
    """Holds a frozen network, a function that computes its patch features, and the mean and std of its input."""

    module: nn.Module
    patch_features: Callable[[Tensor], Tensor]
    """Function that maps normalised images, (images, 3, size, size), to (images, patches, features)."""
    stride: int
    """Side in pixels of the patch that one feature vector describes."""
    mean: Sequence[float]
    std: Sequence[float]


class NetworkTeacher:
    """Computes a frozen network's features of each image patch that the visual tokenizer encodes.

    Images are resized so that the network and the tokenizer have equal numbers of patches. For example, with a 14 x 14
    grid, a network with 16 px patches gets 224 px images.

    Attributes:
        width: number of features per patch.
    """

    def __init__(self, network: _Network, grid_size: int, device: torch.device | str) -> None:
        self._network = network
        network.module.eval().requires_grad_(False).to(device)
        self._image_size = grid_size * network.stride
        self._mean = torch.tensor(network.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(network.std, device=device).view(3, 1, 1)
        features = self(torch.zeros(1, 3, self._image_size, self._image_size, device=device))
        assert features.shape[1] == grid_size**2, f"{features.shape[1]} patch features for a grid of {grid_size}"
        self.width = features.shape[2]

    def to(self, device: torch.device) -> None:
        """Moves the network to a device."""
        self._network.module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Computes the features of every patch.

        Args:
            pixels: images, (images, 3, image_size, image_size) float in [-1, 1].

        Returns:
            Features, (images, patches, features) float32, with patches in row-major order.
        """
        pixels = pixels.float()
        if pixels.shape[-1] != self._image_size:
            size = (self._image_size, self._image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self._network.patch_features(((pixels + 1) / 2 - self._mean) / self._std).float()


def load_network_teacher(config: TeacherConfig, grid_size: int, device: torch.device | str = "cpu") -> NetworkTeacher:
    """Loads the network named by `config.teacher`, for a grid of grid_size x grid_size patches per image.

    * `timm:NAME`: for a transformer, the features are the patch tokens after block `teacher_stage`. For a convolutional
      network, the features are the output of stage `teacher_stage`.
    * `open_clip:NAME/TAG`: the features are the image encoder's patch tokens, projected into the space of the image and
      text embeddings, as BEiT v2 does with CLIP. A local file in `teacher_weights` replaces TAG.
    * `transformers:NAME`: the features are the patch tokens of the last layer. For CLIP, the tokens are also normalised
      and projected. NAME may be a local folder.

    Args:
        config: settings of the teacher.
        grid_size: patches along one side of an image.
        device: device of the network.

    Raises:
        ConfigError: if the library is not installed, if the network or its weights cannot be loaded, or if the network
            has no patches.
    """
    library, _, name = config.teacher.partition(":")
    loaders = {"timm": _load_timm, "open_clip": _load_open_clip, "transformers": _load_transformers}
    try:
        module = importlib.import_module(library)
    except ImportError:
        raise ConfigError(
            f"task.teacher: {config.teacher!r} needs the library {library}, which is not installed. Run: "
            f"pip install {_PACKAGES[library]}"
        ) from None
    if config.teacher_weights is not None and not Path(config.teacher_weights).is_file():
        raise ConfigError(f"task.teacher_weights: {config.teacher_weights} does not exist.")
    try:
        return NetworkTeacher(loaders[library](module, name, config, grid_size), grid_size, device)
    except (OSError, RuntimeError) as error:  # unknown names, failed downloads, weights of another shape
        raise ConfigError(f"task.teacher: {config.teacher!r} cannot be loaded: {error}") from error


def _load_timm(timm: Any, name: str, config: TeacherConfig, grid_size: int) -> _Network:
    model = timm.create_model(name, pretrained=config.teacher_weights is None)
    if config.teacher_weights is not None:
        load_weights(model, config.teacher_weights)
    stages, stage = list(model.feature_info), config.teacher_stage
    if not -len(stages) <= stage < len(stages):
        raise ConfigError(
            f"task.teacher_stage is {stage}; {config.teacher} has the feature maps 0 to {len(stages) - 1} "
            f"(-1 is the last), of strides {', '.join(str(info['reduction']) for info in stages)}."
        )
    stride = stages[stage]["reduction"]
    if hasattr(model, "set_input_size"):  # transformers: positions are resampled
        model.set_input_size(img_size=(grid_size * stride, grid_size * stride))

    def patch_features(images: Tensor) -> Tensor:
        (feature_map,) = model.forward_intermediates(
            images,
            indices=[stage % len(stages)],
            norm=True,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        features: Tensor = feature_map.flatten(2).transpose(1, 2)
        return features

    normalization = model.pretrained_cfg
    return _Network(
        module=model,
        patch_features=patch_features,
        stride=stride,
        mean=normalization["mean"],
        std=normalization["std"],
    )


def _load_open_clip(open_clip: Any, name: str, config: TeacherConfig, grid_size: int) -> _Network:
    architecture, _, tag = name.partition("/")
    pretrained = config.teacher_weights or tag
    known = open_clip.get_model_config(architecture)
    if not pretrained or known is None or "patch_size" not in known["vision_cfg"]:
        raise ConfigError(
            f"task.teacher: {config.teacher!r} must be open_clip:ARCHITECTURE/TAG with a vision "
            f"transformer and its pretrained weights, such as open_clip:ViT-B-16/openai, or teacher_weights must name "
            f"a file of them."
        )
    patch_size = known["vision_cfg"]["patch_size"]
    model = open_clip.create_model(
        architecture, pretrained=pretrained, force_image_size=grid_size * patch_size, output_dict=False
    )
    visual = model.visual
    visual.output_tokens = True

    def patch_features(images: Tensor) -> Tensor:
        _, tokens = visual(images)
        features: Tensor = tokens if visual.proj is None else tokens @ visual.proj
        return features

    return _Network(
        module=visual,
        patch_features=patch_features,
        stride=patch_size,
        mean=visual.preprocess_cfg["mean"],
        std=visual.preprocess_cfg["std"],
    )


def _load_transformers(transformers: Any, name: str, config: TeacherConfig, grid_size: int) -> _Network:
    if config.teacher_weights is not None:
        raise ConfigError(
            f"task.teacher_weights: {config.teacher} reads its weights from the folder in its name. Write "
            f"transformers:FOLDER and leave teacher_weights out."
        )
    model = transformers.AutoModel.from_pretrained(name)
    vision = getattr(model, "vision_model", model)
    patch_size = getattr(vision.config, "patch_size", None)
    if not isinstance(patch_size, int):
        raise ConfigError(f"task.teacher: {config.teacher} has no patches. Use a vision transformer.")
    parameters = inspect.signature(vision.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
    projection = getattr(model, "visual_projection", None)
    num_patches = grid_size**2

    def patch_features(images: Tensor) -> Tensor:
        tokens: Tensor = vision(pixel_values=images, **options).last_hidden_state[:, -num_patches:]
        # CLIP applies this norm and projection to the pooled token only; BEiT v2 applies them to every patch.
        return tokens if projection is None else projection(vision.post_layernorm(tokens))

    processor = transformers.AutoImageProcessor.from_pretrained(name)
    return _Network(
        module=model,
        patch_features=patch_features,
        stride=patch_size,
        mean=processor.image_mean,
        std=processor.image_std,
    )

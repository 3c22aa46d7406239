"""Defines the visual tokenizer, VQ-KD from BEiT v2 (Peng et al., 2022, arXiv:2208.06366, sec. 2.2)."""

# B images, N patches per image, G grid size, D hidden, C width of a code, E width of the teacher's features.

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError, RunConfig, VisualTokenizerConfig
from beit3_ds.config.renamed_keys import without_tokenizer_keys
from beit3_ds.config.strict import load_section
from beit3_ds.printing import printable
from beit3_ds.safetensors_header import check_safetensors
from beit3_ds.tokenizers.quantizer import Quantizer
from beit3_ds.tokenizers.vit import Float32Linear, VisionTransformer, initialize_linear_layers
from beit3_ds.untrusted_json import check_count, check_object, check_text, parse_untrusted_json

_METADATA_KEY = "beit3_ds.visual_tokenizer"


class VisualTokenizer(nn.Module):
    """Encodes each patch of an image as one of `codebook_size` codes.

    The tokenizer consists of a ViT encoder, a codebook, and a ViT decoder. The decoder is used only to train the
    tokenizer: it reconstructs a teacher's features from the codes.

    Args:
        config: architecture of the tokenizer.
        teacher_width: number of the teacher's features per patch.
        teacher_description: description of the teacher, for files and reports.
    """

    def __init__(self, config: VisualTokenizerConfig, teacher_width: int, teacher_description: str = "") -> None:
        super().__init__()
        self.config = config
        self.teacher_width, self.teacher_description = teacher_width, teacher_description
        width, code_width = config.hidden_size, config.codebook_dim
        self.encoder = _build_transformer(config, 3, config.patch_size, config.num_layers)
        self.encode_task_layer = nn.Sequential(Float32Linear(width, width), nn.Tanh(), Float32Linear(width, code_width))
        self.quantize = Quantizer(config.codebook_size, code_width, config.ema_decay)
        self.decoder = _build_transformer(config, code_width, 1, config.decoder_layers)
        self.decode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, teacher_width))
        initialize_linear_layers(self.encode_task_layer)
        initialize_linear_layers(self.decode_task_layer)

    @torch.no_grad()
    def encode(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Encodes images to codes; does not update the codebook.

        Args:
            pixels: images, (images, 3, image_size, image_size) float in [-1, 1].
            dtype: dtype of the matrix products in the encoder's blocks. With bfloat16, rounding changes a few codes
                (`encoding_dtype`).

        Returns:
            Codes in [0, codebook_size), (images, patches) int64, with patches in row-major order.

        Raises:
            ValueError: if `pixels` has another shape or is not floating-point.
        """
        size = self.config.image_size
        found = (pixels.dtype, tuple(pixels.shape)) if isinstance(pixels, Tensor) else (type(pixels).__name__,)
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixels: {' '.join(map(str, found))}, but the visual tokenizer takes floats in [-1, 1] of shape "
                f"(number, 3, {size}, {size}). beit3_ds.preprocess makes them."
            )
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            return self.quantize.nearest(self.project(pixels))

    def project(self, pixels: Tensor) -> Tensor:
        """Maps each patch of images to a unit vector, which the codebook can quantize.

        Args:
            pixels: images, (images, 3, image_size, image_size) float in [-1, 1].

        Returns:
            Unit vectors, (images, patches, width). They are float32 even if the encoder is bfloat16, because rounding
            could change the nearest code.
        """
        features_BND = self.encoder(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            vectors_BNC: Tensor = self.encode_task_layer(features_BND)
            return F.normalize(vectors_BNC, dim=-1)

    def decode(self, vectors_BNC: Tensor) -> Tensor:
        """Reconstructs the teacher's features, (images, patches, features), from code vectors, (images, patches,
        width).
        """
        grid = (self.config.grid_size, self.config.grid_size)
        vector_map = vectors_BNC.transpose(1, 2).unflatten(2, grid)  # (B, C, G, G)
        reconstruction_BNE: Tensor = self.decode_task_layer(self.decoder(vector_map))
        return reconstruction_BNE


def save_visual_tokenizer(path: str | Path, tokenizer: VisualTokenizer) -> None:
    """Writes a visual tokenizer to a safetensors file atomically: a crash leaves the old file or the complete new file.

    The config and the teacher's description are stored as JSON in the metadata.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(serialize_visual_tokenizer(tokenizer))


def serialize_visual_tokenizer(tokenizer: VisualTokenizer) -> bytes:
    """Returns the content of a visual tokenizer's file, as `save_visual_tokenizer` writes it."""
    config = {key: value for key, value in dataclasses.asdict(tokenizer.config).items() if key != "encoding_dtype"}
    description: dict[str, Any] = {"config": config, "teacher_width": tokenizer.teacher_width}
    description["teacher"] = tokenizer.teacher_description
    tensors = {name: value.contiguous() for name, value in tokenizer.state_dict().items()}
    # Written as bytes, because only the owner can read a file that safetensors creates.
    return safetensors.torch.save(tensors, metadata={_METADATA_KEY: json.dumps(description)})


def load_visual_tokenizer(path: str | Path) -> VisualTokenizer:
    """Reads a trained visual tokenizer to the CPU, in evaluation mode and without gradients.

    Raises:
        ConfigError: if the file is missing or is not a visual tokenizer.
    """
    path = Path(path)
    description = _read_description(path)
    fields = without_tokenizer_keys(description["config"])  # version 0.1 also wrote the recipe of the training
    config = load_section(VisualTokenizerConfig, fields, f"{path} (metadata)")
    tokenizer = _build_fitting(path, config, description)
    load_model(tokenizer, path)
    return tokenizer.eval().requires_grad_(False)


def _build_fitting(path: Path, config: VisualTokenizerConfig, description: Mapping[str, Any]) -> VisualTokenizer:
    """Builds the network of a file, after checking that the file's tensors have the expected shapes.

    Raises:
        ConfigError: if a shape differs.
    """
    try:
        width, teacher = check_count(description["teacher_width"]), printable(check_text(description["teacher"]), 500)
        found = {name: torch.Size(stored.shape) for name, stored in check_safetensors(path).tensors.items()}
        if config.num_layers + config.decoder_layers > len(found):
            raise ValueError(f"{len(found)} tensors for {config.num_layers + config.decoder_layers} blocks")
        with torch.device("meta"):
            wanted = {name: value.shape for name, value in VisualTokenizer(config, width).state_dict().items()}
        if changed := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
            raise ValueError(f"{changed[0]} has the shape {found.get(changed[0])} instead of {wanted.get(changed[0])}")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"tokenizers.visual: {path} is damaged: its tensors do not fit its description ({error}). Train the "
            "tokenizer, or import it again."
        ) from error
    return VisualTokenizer(config, width, teacher)


def check_visual_tokenizer_fits(tokenizer: VisualTokenizer, config: RunConfig) -> None:
    """Checks that a trained visual tokenizer has the number of codes, image size and patch size of a run's config.

    Raises:
        ConfigError: if a value differs; the message names the values and the keys to change.
    """
    path, trained, wanted = config.tokenizers.visual.path, tokenizer.config, config.tokenizers.visual
    if config.backbone is not None and trained.codebook_size != config.backbone.visual_vocab_size:
        raise ConfigError(
            f"tokenizers.visual: {path} has {trained.codebook_size} codes, model.visual_vocab_size is "
            f"{config.backbone.visual_vocab_size}. Set model.visual_vocab_size and tokenizers.visual.codebook_size to "
            f"{trained.codebook_size}, or train another tokenizer."
        )
    if (trained.image_size, trained.patch_size) != (wanted.image_size, wanted.patch_size):
        raise ConfigError(
            f"tokenizers.visual: {path} was trained on {trained.image_size} px / patch {trained.patch_size} (a grid of "
            f"{trained.grid_size}), the run wants {wanted.image_size} px / patch {wanted.patch_size} (a grid of "
            f"{wanted.grid_size}). Set image_size and patch_size to the trained ones, or train another tokenizer."
        )


def _build_transformer(
    config: VisualTokenizerConfig, in_channels: int, patch_size: int, num_layers: int
) -> VisionTransformer:
    return VisionTransformer(
        in_channels=in_channels,
        grid_size=config.grid_size,
        patch_size=patch_size,
        hidden_size=config.hidden_size,
        num_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
    )


def _read_description(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the metadata of a visual tokenizer's file.

    Raises:
        ConfigError: if the file is missing or is not a visual tokenizer.
    """
    remedy = (
        "A run of the task visual_tokenizer trains it: `beit3 train FILE.json`, with a file such as "
        "ds_configs/quickstart_visual_tokenizer_cpu.json."
    )
    if not path.is_file():
        raise ConfigError(f"tokenizers.visual: {path} does not exist (looked in {Path.cwd()}). {remedy}")
    try:
        description = check_object(parse_untrusted_json(check_safetensors(path).metadata[_METADATA_KEY]))
        check_object(description["config"])
        return description
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"tokenizers.visual: {path} is not a visual tokenizer of this project. {remedy}") from None

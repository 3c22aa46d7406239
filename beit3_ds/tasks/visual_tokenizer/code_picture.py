"""Draws a picture for checking the visual tokenizer: images, masked images, and the codes as colours."""

# B images, N patches per image, G patches per side, S pixels per side, V codes, C width of a code.

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.augmentation import build_augmentation
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.samples import SampleKey
from beit3_ds.pixels import to_floats
from beit3_ds.tasks.pretraining.config import pretraining_config
from beit3_ds.tasks.pretraining.masking import block_mask
from beit3_ds.tasks.visual_tokenizer.samples import open_views
from beit3_ds.tokenizers import VisualTokenizer

_NUM_IMAGES = 8
_SIDE = 192  # minimum pixels per side of a panel
_MARGIN = 4
_GRAY = 0.5


def code_picture_path(tokenizer: Path) -> Path:
    """Returns the path of the picture that shows a tokenizer's codes. The picture is in the folder of the tokenizer's
    file.

    The extension ".safetensors" is replaced. Other extensions are kept, so tokenizers named `v.one` and `v.two` have
    different pictures.

    Args:
        tokenizer: path of the tokenizer's file.
    """
    return tokenizer.with_name(f"{tokenizer.name.removesuffix('.safetensors')}.png")


def write_code_picture(config: RunConfig, tokenizer: VisualTokenizer, path: str | Path) -> None:
    """Writes a PNG that shows the codes of up to 8 training images, one row per image (`draw_codes`).

    Args:
        config: the run's configuration, with training images or pairs.
        tokenizer: a trained tokenizer.
        path: .png file to write.

    Raises:
        ConfigError: if the training images cannot be read.
    """
    views = _draw_views(config)
    grid_size = tokenizer.config.grid_size
    num_masked = round(pretraining_config(config).image_mask_ratio * grid_size**2)
    rngs = [sample_rng(config.training.seed, "picture mask", index) for index in range(len(views))]
    masks = torch.from_numpy(np.stack([block_mask(grid_size, num_masked, rng) for rng in rngs]))
    picture = Image.fromarray(draw_codes(tokenizer.cpu(), views, masks))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(path)) as file:
        picture.save(file, "PNG")


def _draw_views(config: RunConfig) -> Tensor:
    """Returns augmented views of up to 8 random training images, (images, 3, size, size); skips broken images."""
    sources = (*config.data.images.train, *config.data.pairs.train)
    different = tuple(dict.fromkeys(dataclasses.replace(source, weight=None) for source in sources))
    stream = open_views(config, different, build_augmentation(config, config.data.flip_probability))
    seed, views = config.training.seed, []
    for index in sample_rng(seed, "picture images").permutation(len(stream)).tolist():
        try:
            view = stream.prepare(SampleKey(seed, "picture", 0, index))
        except BrokenRecordError:
            continue
        views.append(to_floats(view.pixels[None], None if view.colors is None else view.colors[None])[0])
        if len(views) == _NUM_IMAGES:
            break
    if not views:
        raise ConfigError(f"data: none of the {len(stream)} training images can be read.")
    return torch.stack(views)


def draw_codes(tokenizer: VisualTokenizer, views: Tensor, masks: Tensor) -> NDArray[np.uint8]:
    """Draws one row per image: the image, the image with masked patches in gray, and the codes as colours.

    Args:
        tokenizer: a trained tokenizer, on the CPU.
        views: pixels, (images, 3, size, size) float in [-1, 1].
        masks: True for masked patches, (images, patches) bool.

    Returns:
        Pixels of the picture, (height, width, 3) uint8.
    """
    grid_size = tokenizer.config.grid_size
    inputs = (views + 1) / 2
    hidden = masks.view(-1, 1, grid_size, grid_size).repeat_interleave(views.shape[-1] // grid_size, dim=2)
    hidden = hidden.repeat_interleave(views.shape[-1] // grid_size, dim=3)
    colors = code_colors(tokenizer.quantize.weight)[tokenizer.encode(views)]  # (B, N, 3)
    codes = colors.transpose(1, 2).unflatten(2, (grid_size, grid_size))
    side = math.ceil(_SIDE / views.shape[-1]) * views.shape[-1]
    panels = [inputs, inputs.masked_fill(hidden, _GRAY), codes]
    panels = [F.pad(F.interpolate(panel, (side, side)), [_MARGIN] * 4, value=1.0) for panel in panels]
    rows = torch.cat(panels, dim=3)  # (B, 3, height, width)
    picture = torch.cat(list(rows), dim=1).permute(1, 2, 0)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def code_colors(codebook_VC: Tensor) -> Tensor:
    """Returns one RGB colour per code; similar codes have similar colours.

    The codes are projected on the first three principal components of the codebook. Each colour channel is the code's
    rank along one component, scaled to [0, 1].

    Returns:
        Colours, (codes, 3) float in [0, 1]; missing components give 0.5.
    """
    centered = (codebook_VC - codebook_VC.mean(dim=0)).double()
    directions = torch.linalg.svd(centered, full_matrices=False).Vh[:3]
    places = (centered @ directions.T).argsort(dim=0).argsort(dim=0)
    colors = places.float() / max(1, len(codebook_VC) - 1)
    return F.pad(colors, (0, 3 - colors.shape[1]), value=0.5)

"""Encodes the images of pretraining as visual tokens; the tensor-parallel ranks share the work."""

# B images, N patches per image.

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.parallel import TensorParallel
from beit3_ds.pixels import to_floats
from beit3_ds.tokenizers import VisualTokenizer


@dataclass
class CodeEncoder:
    """Encodes images with a frozen visual tokenizer; each tensor-parallel rank encodes a part of the images."""

    tokenizer: VisualTokenizer
    """The trained tokenizer, in float32."""
    dtype: torch.dtype = torch.float32
    """Dtype of the encoder's matrix products (`tokenizers.visual.encoding_dtype`)."""
    tensor: TensorParallel = field(default_factory=TensorParallel)
    """Tensor-parallel group, set by `start`; by default, this process alone."""

    def start(self, tensor: TensorParallel, device: torch.device) -> None:
        """Moves the tokenizer to the device and sets the tensor-parallel group for `encode`."""
        self.tokenizer.to(device)
        self.tensor = tensor

    def encode(self, pixels: Tensor, colors: Tensor | None = None) -> Tensor:
        """Returns the visual codes of images, (images, patches) int64, equal on all tensor-parallel ranks.

        All tensor-parallel ranks must call this method with the same images. Each rank encodes a part of the images;
        the ranks all-gather the codes.

        Args:
            pixels: images as in `PackedBatch.pixels`, (images, 3, size, size).
            colors: colour changes of 8-bit images, as in `PackedBatch.colors`; None without changes.
        """
        part = -(-len(pixels) // self.tensor.size)
        own = slice(self.tensor.rank * part, (self.tensor.rank + 1) * part)
        codes = self.encode_alone(pixels[own], None if colors is None else colors[own])
        padded = F.pad(codes, (0, 0, 0, part - len(codes)))
        return self.tensor.all_gather(padded).flatten(0, 1)[: len(pixels)]

    def encode_alone(self, pixels: Tensor, colors: Tensor | None = None) -> Tensor:
        """Returns the visual codes of images, (images, patches) int64; this rank encodes all images, without
        communication.

        Args:
            pixels: images as in `PackedBatch.pixels`, (images, 3, size, size).
            colors: colour changes of 8-bit images, as in `PackedBatch.colors`; None without changes.
        """
        if not len(pixels):
            num_patches = self.tokenizer.config.grid_size**2
            return torch.empty(0, num_patches, dtype=torch.int64, device=pixels.device)
        return self.tokenizer.encode(to_floats(pixels, colors), self.dtype)

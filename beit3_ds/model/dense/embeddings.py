"""Embeds images of any size. The patches of an image are ordered window by window."""

# T patches of all images, B images, H and W pixels of the padded images, P values per patch, D hidden,
# S patches per side of a grid of positions.

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.device_copy import copy_to_device
from beit3_ds.kernels.ops.embedding import embedding
from beit3_ds.model.embeddings import stream_dtype
from beit3_ds.parallel import TensorParallel
from beit3_ds.patch_grids import Grids, PatchPlaces, patch_places


class PatchRowProjection(nn.Conv2d):
    """Projects patches that are already cut out and ordered, with the same parameters as `PatchProjection`."""

    def forward(self, patches_TP: Tensor) -> Tensor:
        """Returns the embedding of each patch, (T, D)."""
        return F.linear(patches_TP.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class DenseEmbeddings(nn.Module):
    """Embeds images of any size without a CLS token; the patch size must divide the images' sides.

    Patches are ordered window by window (`patch_grids`), so blocks with windows need no permutation.

    The position table covers S x S patches, where S is `ModelConfig.grid_size`. Smaller images use the table's top left
    corner, as if they were padded to the model's image size. If a side of an image is larger, the table is resampled
    bicubically to a square table for the image's longer side. Each tensor-parallel rank embeds all rows. With sequence
    parallelism, a rank then keeps only a part of the rows (`TensorParallel.scatter_rows`).
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel, *, fp32_residual_connection: bool = False) -> None:
        super().__init__()
        assert config.dense is not None, "the model takes images of one size"
        self.fp32_residual_connection = fp32_residual_connection
        self.config, self.tensor, self.window_size = config, tensor, config.dense.window_size
        self.patch = PatchRowProjection(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.image_position = nn.Parameter(torch.empty(config.num_patches, config.hidden_size))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Embeds a batch, and returns this rank's rows of the residual stream.

        Raises:
            ConfigError: if the batch contains texts, or does not set `PackedBatch.image_grids`.
        """
        if batch.num_sequences != len(batch.image_grids):
            raise ConfigError(
                f"the batch has {batch.num_sequences} inputs and {len(batch.image_grids)} grids of patches, but a "
                "model with model.dense takes images with a grid each. Pack them with data.packing.pack_grids."
            )
        assert batch.pixels is not None, "the batch has no pixels: another stage of the pipeline reads them"
        places = patch_places(batch.image_grids, self.window_size, batch.pixels.device)
        x_TD = self.patch(_cut_patches(batch.pixels, self.config.patch_size, places))
        x_TD = self.tensor.scatter_rows(x_TD + self._positions(batch.image_grids, places))
        return x_TD.to(stream_dtype(x_TD.dtype)) if self.fp32_residual_connection else x_TD

    def _positions(self, grids: Grids, places: PatchPlaces) -> Tensor:
        """Returns the position embedding of each patch, (T, D)."""
        own = self.config.grid_size
        sides = [max(own, *grid) for grid in grids]
        larger = sorted({side for side in sides if side > own})
        starts: dict[int, int] = {own: 0}
        tables: list[Tensor] = [self.image_position]
        for side in larger:
            starts[side] = sum(len(table) for table in tables)
            tables.append(resample_table(self.image_position, side))
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        device = places.row_T.device
        start_B = copy_to_device(torch.tensor([starts[side] for side in sides] or [0]), device)
        side_B = copy_to_device(torch.tensor(sides or [own]), device)
        ids_T = start_B[places.image_T] + places.row_T * side_B[places.image_T] + places.column_T
        return embedding(ids_T, table)


def resample_table(table_SD: Tensor, side: int) -> Tensor:
    """Resamples a square position table bicubically, from (S * S, D) to (side * side, D).

    Resampling is a product with weight matrices, so its backward pass needs no atomic additions and is deterministic.
    """
    old = round(len(table_SD) ** 0.5)
    weights = _resampling_weights(old, side).to(table_SD)
    grid = table_SD.unflatten(0, (old, old))
    return torch.einsum("ai,bj,ijd->abd", weights, weights, grid).flatten(0, 1)


@lru_cache(maxsize=16)
def _resampling_weights(old: int, new: int) -> Tensor:
    """Returns the float64 matrix (new, old) that resamples one axis of a grid bicubically."""
    columns = F.interpolate(
        torch.eye(old, dtype=torch.float64)[None, :, :, None], (new, 1), mode="bicubic", align_corners=False
    )
    return columns[0, :, :, 0].T.contiguous()


def _cut_patches(pixels_BCHW: Tensor, size: int, places: PatchPlaces) -> Tensor:
    """Returns the pixels of each patch in the order of the residual stream, (T, P)."""
    patches = pixels_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return patches.permute(0, 2, 4, 1, 3, 5)[tuple(places)].flatten(1)

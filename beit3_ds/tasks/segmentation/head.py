"""Defines the head that segments images: adapter or pyramid, Mask2Former's decoders, and the loss."""

# B images, T patches of all images, M rows that the head reads, D hidden, C classes, K terms.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ActivationCheckpointing, ModelConfig
from beit3_ds.model import Head, initial_value
from beit3_ds.model.dense.canvas import to_canvas
from beit3_ds.model.dense.pyramid import SimpleFeaturePyramid
from beit3_ds.model.vit_adapter import ViTAdapter, adapter_initial_value
from beit3_ds.parallel import DividedSamples, TensorParallel, sum_gradients
from beit3_ds.patch_grids import Grid
from beit3_ds.tasks.segmentation.config import SegmentationConfig
from beit3_ds.tasks.segmentation.mask_decoder import MaskDecoder, QueryPredictions, decoder_initial_value
from beit3_ds.tasks.segmentation.mask_loss import MaskLoss
from beit3_ds.tasks.segmentation.packing import LABELS, SEEDS

_MAPS = ("4", "8", "16", "32")


class SegmentationHead(Head):
    """Segments images of one size from the trunk's rows.

    With an adapter, the model passes the adapter's maps to `segment`, because the adapter works between the blocks.
    Without one, a simple feature pyramid makes the maps from the last rows. Tensor-parallel ranks hold equal copies of
    all parameters; for the loss each computes its own images (`DividedSamples`), for predictions all.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel,
        settings: SegmentationConfig,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's sizes.
            tensor: the tensor-parallel group.
            settings: the task's settings.
            activation_checkpointing: "full" recomputes the adapter's injectors and extractors in the backward pass.

        Raises:
            ConfigError: if the adapter does not fit the model, or transformers or scipy is not installed.
        """
        super().__init__()
        self.tensor, self.settings, self.config = tensor, settings, config
        hidden, recomputes = config.hidden_size, activation_checkpointing == "full"
        self.adapter = (
            ViTAdapter(settings.adapter, hidden, config.num_layers, recomputes=recomputes) if settings.adapter else None
        )
        width = settings.decoder.hidden_size
        self.pyramid = None if settings.adapter else SimpleFeaturePyramid(hidden, width)
        self.decoder = MaskDecoder(settings, hidden if settings.adapter else width)

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Segments images from the last rows of a trunk without an adapter.

        Args:
            h_MD: all rows after the final norm.
            batch: the packed micro-batch; all images have one size.
            with_loss: True returns sums of loss terms, False probabilities.

        Returns:
            The result of `segment`.
        """
        assert self.pyramid is not None and self.config.dense is not None, "the head has an adapter"
        divided = divide_samples(batch, self.tensor, with_loss=with_loss)
        rows = divided.take(h_MD)
        own_grids = batch.image_grids[divided.own]
        maps = self.pyramid(to_canvas(rows, own_grids, self.config.dense.window_size))
        return self.segment([maps[name] for name in _MAPS], batch, with_loss)

    def segment(self, maps: Sequence[Tensor], batch: PackedBatch, with_loss: bool) -> Tensor:
        """Runs the decoders and computes the sums of the loss terms, or the probabilities of classes.

        Args:
            maps: the four maps of this rank's images: its own ones if `with_loss`, otherwise all.
            batch: the packed micro-batch, with labels and seeds of all images if `with_loss`.
            with_loss: True returns sums of loss terms, False probabilities.

        Returns:
            The sums of the terms over all images of the batch, (3,) float32; or the score of each class at each pixel,
            between 0 and the number of queries, (B, C, height, width) float32. The same on all tensor-parallel ranks.
        """
        sum_gradients(self, self.tensor)
        layers = self.decoder(maps)
        if not with_loss:
            return class_scores(layers[-1], pixel_size(batch, self.config.patch_size))
        divided = divide_samples(batch, self.tensor, with_loss=True)
        labels, seeds = (batch.targets[name][divided.own] for name in (LABELS, SEEDS))
        return divided.sum_terms(MaskLoss(self.settings, labels.device).sums(layers, labels, seeds))

    def initial_value(self, name: str, shape: torch.Size, seed: int, generator: torch.Generator) -> Tensor:
        """Returns the initial value of a parameter of the head.

        Args:
            name: name of the parameter within the head.
            shape: its shape.
            seed: seed of the run.
            generator: generator of random values, seeded for this parameter.
        """
        part, _, rest = name.partition(".")
        value = None
        if part == "adapter" and self.settings.adapter:
            value = adapter_initial_value(rest, shape, self.settings.adapter, generator)
        elif part == "decoder":
            value = decoder_initial_value(rest, shape, self.settings.decoder, generator)
        if value is None and len(shape) == 1:  # norms and biases
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return initial_value(f"heads.{name}", shape, self.config, seed) if value is None else value


def divide_samples(batch: PackedBatch, tensor: TensorParallel, *, with_loss: bool) -> DividedSamples:
    """Returns the division of a batch's images over the tensor-parallel ranks; for predictions, each rank has all."""
    rows = tuple(rows * columns for rows, columns in batch.image_grids)
    return DividedSamples(tensor if with_loss else TensorParallel(), rows)


def common_grid(batch: PackedBatch, patch_size: int) -> Grid:
    """Returns the grid of patches that all images of a batch have; for no images, that of the empty pixels."""
    assert batch.pixels is not None, "the batch has no pixels"
    grid = batch.pixels.shape[2] // patch_size, batch.pixels.shape[3] // patch_size
    assert all(own == grid for own in batch.image_grids), "all images of a micro-batch have one size"
    return grid


def pixel_size(batch: PackedBatch, patch_size: int) -> tuple[int, int]:
    """Returns the height and width that all images of a batch have, in pixels."""
    rows, columns = common_grid(batch, patch_size)
    return rows * patch_size, columns * patch_size


def class_scores(predictions: QueryPredictions, size: tuple[int, int]) -> Tensor:
    """Returns the score of each class at each pixel: the sum over queries of class times mask probability.

    Args:
        predictions: predictions of the last layer, for B images.
        size: height and width of the result; the masks are resized to it bilinearly.

    Returns:
        Scores, (B, C, height, width) float32.
    """
    classes = predictions.classes_BQX.softmax(-1)[..., :-1]
    masks = predictions.masks_BQHW
    if not len(masks):
        return masks.new_zeros(0, classes.shape[2], *size)
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes, masks)

"""Defines the segmentation head: adapter or feature pyramid, Mask2Former's decoders, and the loss."""

# B images, T patches of all images, M rows that the head reads, D hidden, C classes, K terms.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ActivationCheckpointing, ModelConfig
from beit3_ds.model import Head
from beit3_ds.model.dense.canvas import to_canvas
from beit3_ds.model.dense.pyramid import SimpleFeaturePyramid
from beit3_ds.model.vit_adapter import ViTAdapter, adapter_initial_value
from beit3_ds.parallel import DividedSamples, TensorParallel, sum_gradients
from beit3_ds.patch_grids import Grid
from beit3_ds.tasks.segmentation.config import SegmentationConfig
from beit3_ds.tasks.segmentation.mask_decoder import MaskDecoder, QueryPredictions, decoder_initial_value
from beit3_ds.tasks.segmentation.mask_loss import MaskLoss
from beit3_ds.tasks.segmentation.packing import CLASS_COUNTS, CLASSES, LABELS, SEEDS

_MAPS = ("4", "8", "16", "32")


class SegmentationHead(Head):
    """Segments images of one size from the hidden states of BEiT-3's blocks.

    With an adapter, the model runs the adapter between the blocks, and passes the adapter's feature maps to `segment`.
    Without an adapter, a simple feature pyramid builds the maps from the output of the last block. Tensor-parallel
    ranks have equal copies of all parameters. For the loss, each tensor-parallel rank computes a part of the images
    (`DividedSamples`). For predictions, each rank computes all images.
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
            config: the model's configuration.
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
        """Segments images from the output of the last block; only for a head without an adapter.

        Args:
            h_MD: output of the last block after the final norm, (rows, hidden size).
            batch: the packed micro-batch; all images have one size.
            with_loss: True returns sums of loss terms, False class scores.

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
        """Runs the decoders on feature maps; returns the sums of the loss terms, or the class scores.

        Args:
            maps: four feature maps, with 1/4 to 1/32 of the images' height and width. For class scores, maps of all
                images. For the loss, maps of this rank's part of the images; this method all-reduces the ranks' sums.
            batch: the packed micro-batch; for the loss, needs labels and seeds of all images.
            with_loss: True returns sums of loss terms, False class scores.

        Returns:
            Sums of the three terms over all images, (3,) float32; or the score of each class at each pixel, (images,
            classes, height, width) float32. A score is at least 0 and at most the number of queries. The result is
            equal on all tensor-parallel ranks.
        """
        sum_gradients(self, self.tensor)
        layers = self.decoder(maps)
        if not with_loss:
            return class_scores(layers[-1], pixel_size(batch, self.config.patch_size))
        divided = divide_samples(batch, self.tensor, with_loss=True)
        labels, seeds = batch.targets[LABELS][divided.own], batch.host_targets[SEEDS][divided.own].tolist()
        classes = batch.targets[CLASSES].split(batch.host_targets[CLASS_COUNTS].tolist())[divided.own]
        return divided.sum_terms(MaskLoss(self.settings, labels.device).sums(layers, labels, classes, seeds))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Returns the initial value of a parameter of the adapter, the decoder or a norm (`Head.initial_value`)."""
        part, _, rest = name.partition(".")
        value = None
        if part == "adapter" and self.settings.adapter:
            value = adapter_initial_value(rest, shape, self.settings.adapter, generator)
        elif part == "decoder":
            value = decoder_initial_value(rest, shape, self.settings.decoder, generator)
        if value is None and len(shape) == 1:  # scales and biases, which have one dimension
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return value


def divide_samples(batch: PackedBatch, tensor: TensorParallel, *, with_loss: bool) -> DividedSamples:
    """Divides a batch's images over the tensor-parallel ranks if `with_loss` is true.

    Otherwise, for predictions, each rank gets all images.
    """
    rows = tuple(rows * columns for rows, columns in batch.image_grids)
    return DividedSamples(tensor if with_loss else TensorParallel(), rows)


def common_grid(batch: PackedBatch, patch_size: int) -> Grid:
    """Returns the patch grid, (rows, columns), that all images of a batch have."""
    assert batch.pixels is not None, "the batch has no pixels"
    grid = batch.pixels.shape[2] // patch_size, batch.pixels.shape[3] // patch_size
    assert all(own == grid for own in batch.image_grids), "all images of a micro-batch have one size"
    return grid


def pixel_size(batch: PackedBatch, patch_size: int) -> tuple[int, int]:
    """Returns the height and width in pixels that all images of a batch have."""
    rows, columns = common_grid(batch, patch_size)
    return rows * patch_size, columns * patch_size


def class_scores(predictions: QueryPredictions, size: tuple[int, int]) -> Tensor:
    """Returns the score of each class at each pixel: class probability times mask probability, summed over the queries.

    Args:
        predictions: the queries' predictions after the last layer.
        size: height and width of the result; masks are resized bilinearly.

    Returns:
        Scores, (images, classes, height, width) float32.
    """
    classes = predictions.classes_BQX.softmax(-1)[..., :-1]
    masks = predictions.masks_BQHW
    if not len(masks):
        return masks.new_zeros(0, classes.shape[2], *size)
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes, masks)

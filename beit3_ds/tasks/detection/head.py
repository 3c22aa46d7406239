"""Defines the detection head: feature pyramid, proposal network, three box stages and mask head.

The head follows paper section 3.2.
"""

# T rows of the patches of all images, D hidden, I images or views.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.model.dense.canvas import to_canvas
from beit3_ds.model.dense.pyramid import SimpleFeaturePyramid
from beit3_ds.parallel import DividedSamples, TensorParallel, sum_gradients
from beit3_ds.patch_grids import Grids
from beit3_ds.tasks.detection.boxes import Pyramid, repeat_edges
from beit3_ds.tasks.detection.cascade import Cascade, sample_proposals
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.detections import Detections, choose_detections
from beit3_ds.tasks.detection.initial_values import head_initial_value
from beit3_ds.tasks.detection.mask_head import MaskHead
from beit3_ds.tasks.detection.objects import SEEDS, SIZES, ImageObjects, unpack_objects
from beit3_ds.tasks.detection.proposals import ProposalNetwork, anchor_losses, propose
from beit3_ds.tasks.detection.views import Size, View, read_views


class DetectionHead(Head):
    """Detects objects with a cascade of box stages and a mask head on ViTDet's simple feature pyramid.

    In training, tensor-parallel ranks divide the images of a micro-batch (`DividedSamples`). If every rank computed all
    images, the nondeterministic gradient of RoIAlign would make the ranks' copies of the head differ. The losses of an
    image depend only on the image and its seed, not on other images. Their sum over all images of a step is therefore
    the same for any number of micro-batches and ranks. Every module runs once per micro-batch, even on zero boxes.
    """

    def __init__(
        self, config: ModelConfig, settings: DetectionConfig, num_classes: int, tensor: TensorParallel | None = None
    ) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's configuration; `dense` must be set.
            settings: the task's settings.
            num_classes: number of classes.
            tensor: the tensor-parallel group; its ranks have full copies of the head and divide the images.
        """
        super().__init__()
        assert config.dense is not None, "detection needs a backbone for images of any size"
        self.settings, self.tensor = settings, tensor or TensorParallel()
        self._window_size, self._patch_size = config.dense.window_size, config.patch_size
        channels = settings.pyramid_channels
        self.pyramid = SimpleFeaturePyramid(config.hidden_size, channels)
        # The pyramid's strides assume a patch size of 16; other patch sizes scale them.
        self._strides = {name: stride * config.patch_size // 16 for name, stride in self.pyramid.strides.items()}
        self.proposals = ProposalNetwork(channels, list(self._strides.values()), settings.anchor_scale)
        self.boxes = Cascade(channels, settings.box_width, num_classes)
        self.masks = MaskHead(channels, num_classes) if settings.masks else None

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Returns the initial value of a weight (`head_initial_value`); None for norms and biases."""
        return head_initial_value(name, shape, generator)

    def forward(self, h_TD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the loss terms, each summed over the images, (terms,) float32; or the detections of every sample.

        The terms are the objectness loss and the regression loss of the anchors, the class loss and the regression loss
        of the boxes and, if masks are trained, the mask loss.

        Args:
            h_TD: hidden states of the patches of all images, window by window (`patch_grids`).
            batch: the packed micro-batch. For the loss, its targets contain objects, sizes and seeds of the images; for
                detections, the views of the samples.
            with_loss: True returns loss terms, False detections.
        """
        if with_loss:
            return self._losses(h_TD, batch)
        return self._detect(h_TD, batch.image_grids, read_views(batch.host_targets, _sizes(batch.host_targets)))

    def _losses(self, h_TD: Tensor, batch: PackedBatch) -> Tensor:
        sum_gradients(self, self.tensor)
        divided = DividedSamples(self.tensor, tuple(rows * columns for rows, columns in batch.image_grids))
        own = divided.own
        sizes = _sizes(batch.host_targets)[own]
        objects = unpack_objects(batch.targets, batch.host_targets)[own]
        sums = self._own_losses(divided.take(h_TD), batch.image_grids[own], sizes, objects, batch.targets[SEEDS][own])
        return divided.sum_terms(sums)

    def _own_losses(
        self, h_TD: Tensor, grids: Grids, sizes: Sequence[Size], objects: Sequence[ImageObjects], seeds: Tensor
    ) -> Tensor:
        settings, pyramid = self.settings, self._maps(h_TD, grids)
        outputs = self.proposals(pyramid, sizes)
        anchors = self.proposals.anchors(outputs, sizes)
        per_image = zip(anchors, objects, seeds, strict=True)
        proposed = [
            anchor_losses(of_image, found, seed, settings.sampled_anchors) for of_image, found, seed in per_image
        ]
        sampled = []
        for of_image, size, found, seed in zip(anchors, sizes, objects, seeds, strict=True):
            proposals = propose(of_image, size, settings.proposals_per_level, settings.proposals)
            sampled.append(sample_proposals(proposals, len(of_image.boxes), found, seed, settings.sampled_boxes))
        pooled = self._pooled(pyramid, grids)
        sums = [
            torch.stack([outputs.nothing.new_zeros(2), *proposed]).sum(0) + outputs.nothing,
            self.boxes.losses(pooled, sampled, objects, sizes, settings.sampled_boxes),
        ]
        if self.masks is not None:
            sums.append(self.masks.losses(pooled, sampled, objects)[None])
        return torch.cat(sums)

    def _detect(self, h_TD: Tensor, grids: Grids, views: Sequence[View]) -> list[Detections]:
        settings, sizes, pyramid = self.settings, [view.size for view in views], self._maps(h_TD, grids)
        anchors = self.proposals.anchors(self.proposals(pyramid, sizes), sizes)
        proposals = [
            propose(of_view, size, settings.proposals, settings.proposals).boxes
            for of_view, size in zip(anchors, sizes, strict=True)
        ]
        pooled = self._pooled(pyramid, grids)
        found = choose_detections(views, self.boxes.predict(pooled, proposals, sizes), settings.build_suppression())
        if self.masks is None:
            return found
        boxes = [view.from_image(found[view.sample].boxes) for view in views]
        labels = [found[view.sample].labels for view in views]
        return _with_masks(found, views, self.masks.predict(pooled, boxes, labels))

    def _maps(self, h_TD: Tensor, grids: Grids) -> Pyramid:
        maps: Mapping[str, Tensor] = self.pyramid(to_canvas(h_TD, grids, self._window_size), grids)
        return {self._strides[name]: features for name, features in maps.items()}

    def _pooled(self, pyramid: Pyramid, grids: Grids) -> Pyramid:
        """Returns the pyramid levels for RoIAlign: all levels except the coarsest, which only the proposal network
        uses.
        """
        pooled = {}
        for stride in sorted(pyramid)[:-1]:
            cells = [[-(-side * self._patch_size // stride) for side in grid] for grid in grids]
            pooled[stride] = repeat_edges(pyramid[stride], [(rows, columns) for rows, columns in cells])
        return pooled


def _sizes(host_targets: Mapping[str, Tensor]) -> list[Size]:
    return [(height, width) for height, width in host_targets[SIZES].tolist()]


def _with_masks(found: Sequence[Detections], views: Sequence[View], masks: Sequence[Tensor]) -> list[Detections]:
    """Returns the detections with masks; the mask of a detection is the mean over the sample's views."""
    of_samples: list[list[Tensor]] = [[] for _ in found]
    for view, masks_NSS in zip(views, masks, strict=True):
        of_samples[view.sample].append(view.mask_to_image(masks_NSS))
    return [
        detections._replace(masks=torch.stack(of_sample).mean(0))
        for detections, of_sample in zip(found, of_samples, strict=True)
    ]

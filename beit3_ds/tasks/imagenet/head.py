"""Defines a head that classifies images with a linear layer, like the ImageNet model in Microsoft's BEiT-3 code.

For classification by class names, as in the paper (section 3.2), the task uses `retrieval.head.ContrastiveHead`.
"""

# I images, L rows per image (CLS and patches), M rows of the patches of all images, D hidden, C classes.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.layout import PickedRows, SequenceLayout
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel

CLASSES = "classes"
"""Key in `PackedBatch.targets`: class label of each image, (images,) int64."""


class LinearClassHead(Head):
    """Classifies an image by LayerNorm and a linear layer on the mean of its patches.

    The batch contains images without texts. The head reads only the rows of the patches (`patch_rows`). Parameters are
    replicated on all tensor-parallel ranks, which compute equal logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        tensor: TensorParallel | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's configuration.
            num_classes: number of classes.
            tensor: the tensor-parallel group; unused, because the parameters are replicated.
            label_smoothing: share of the target probability that is spread evenly over all classes.
        """
        super().__init__()
        self.pooled_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.classes = nn.Linear(config.hidden_size, num_classes)
        self.label_smoothing = label_smoothing

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns two terms summed over images, (2,) float32, or the class logits, (images, classes) float32.

        The first term is the cross entropy. The second term is the number of correct answers, without gradient.

        Args:
            h_MD: hidden states of the patches of all images, (images * patches, hidden size).
            batch: the packed micro-batch; needs `CLASSES` if `with_loss`.
            with_loss: True returns the terms, False the logits.
        """
        patches = batch.image_length - 1
        pooled_ID = h_MD.unflatten(0, (batch.num_images, patches)).mean(1)
        logits_IC = self.classes(self.pooled_norm(pooled_ID)).float()
        if not with_loss:
            return logits_IC
        classes_I = batch.targets[CLASSES]
        loss = F.cross_entropy(logits_IC, classes_I, reduction="sum", label_smoothing=self.label_smoothing)
        return torch.stack([loss, (logits_IC.argmax(1) == classes_I).sum().float()])


def patch_rows(layout: SequenceLayout) -> PickedRows:
    """Returns the rows of the patches of all images, without the CLS rows, in the order of the batch."""
    rows_IL = torch.arange(layout.part_rows[0]).view(layout.num_images, layout.image_length)
    patches = rows_IL[:, 1:].flatten()
    return PickedRows(patches, (len(patches), 0, 0, 0))

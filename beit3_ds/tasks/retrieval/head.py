"""Computes features of images and texts that a contrastive loss compares, with the reference's retrieval heads."""

# I images, X texts, D hidden.

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head, StepFeatures
from beit3_ds.parallel import TensorParallel

IMAGE_FEATURES = "image"
"""Key in `StepFeatures.rows` of the features of images, (images, hidden size) float32 of length 1."""
TEXT_FEATURES = "text"
"""Key in `StepFeatures.rows` of the features of texts, (texts, hidden size) float32 of length 1."""
SCALE = "scale"
"""Key in `StepFeatures.shared` of the factor that scales similarities, (1,) float32."""

INITIAL_LOG_SCALE = math.log(1 / 0.07)
"""Logarithm of the initial factor that scales similarities (CLIP, Radford et al., 2021, arXiv:2103.00020)."""
LARGEST_SCALE = 100.0
"""Upper limit of the factor that scales similarities (CLIP, section 2.5)."""


class Temperature(nn.Module):
    """Computes the learned factor that scales similarities, at most `LARGEST_SCALE`.

    The parameter is the logarithm of the factor minus `INITIAL_LOG_SCALE`, because bf16 resolves small numbers better.
    The parameter is named `bias`, so it starts at 0 and has no weight decay. Its shape is (1,), because DeepSpeed
    refuses parameters without dimensions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        """Returns the factor, (1,) float32; above the limit, only gradients that lower the parameter pass."""
        log_scale: Tensor = _Limit.apply(self.bias.float() + INITIAL_LOG_SCALE, math.log(LARGEST_SCALE))
        return log_scale.exp()


class ContrastiveHead(Head):
    """Projects the CLS row of every image and the BOS row of every text, and scales the features to length 1.

    Each modality has a linear layer without bias (paper section 3.1). The loss compares all samples of a step, so the
    head returns features (`Task.step_loss`). Every tensor-parallel rank has the whole head. The batch's head rows are
    the first rows of its images and texts (`SequenceLayout.first_rows`).
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel | None = None) -> None:
        """Builds the layers of the head, with uninitialised parameters.

        Args:
            config: the model's sizes.
            tensor: the tensor-parallel group, which the head does not use: its parameters are replicated.
        """
        super().__init__()
        self.image = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.text = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.temperature = Temperature()

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the features of a micro-batch, for training and for evaluation.

        Args:
            h_MD: CLS rows of images, then BOS rows of texts, (images + texts, hidden size).
            batch: the packed micro-batch. Its targets, integers with one row per sample, are copied to the result.
            with_loss: has no effect.

        Returns:
            `StepFeatures` with `IMAGE_FEATURES`, `TEXT_FEATURES`, the targets and `SCALE`.
        """
        h_ID, h_XD = h_MD.split([batch.num_images, batch.num_texts])
        rows = {
            IMAGE_FEATURES: F.normalize(self.image(h_ID).float(), dim=1),
            TEXT_FEATURES: F.normalize(self.text(h_XD).float(), dim=1),
        }
        return StepFeatures(rows | dict(batch.targets), {SCALE: self.temperature()})


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: float) -> Tensor:
        ctx.beyond = x > largest
        return x.clamp(max=largest)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        # A clamp passes no gradient beyond its limit, so a scale that one update raised above the limit would stay.
        return torch.where(ctx.beyond & (dx < 0), 0, dx), None

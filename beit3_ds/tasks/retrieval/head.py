"""Computes features of images and texts for a contrastive loss, like the retrieval models of Microsoft's code."""

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
"""Key in `StepFeatures.rows`: features of images, (images, hidden size) float32, normalised to length 1."""
TEXT_FEATURES = "text"
"""Key in `StepFeatures.rows`: features of texts, (texts, hidden size) float32, normalised to length 1."""
SCALE = "scale"
"""Key in `StepFeatures.shared`: factor that scales cosine similarities to scores, (1,) float32."""

INITIAL_LOG_SCALE = math.log(1 / 0.07)
"""Initial logarithm of the scale of similarities (CLIP, Radford et al., 2021, arXiv:2103.00020)."""
LARGEST_SCALE = 100.0
"""Maximum scale of similarities (CLIP, section 2.5)."""


class Temperature(nn.Module):
    """Learns the factor that scales similarities. The factor is at most `LARGEST_SCALE`.

    The parameter is the difference of log(factor) and `INITIAL_LOG_SCALE`. This difference is small, and bf16 has a
    finer resolution for small numbers. The parameter is named `bias`, because parameters with this name start at 0 and
    have no weight decay. The shape is (1,), because DeepSpeed rejects parameters without dimensions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        """Returns the factor that scales similarities, (1,) float32.

        If the parameter's value gives a factor above `LARGEST_SCALE`, the result is `LARGEST_SCALE`, and the backward
        pass drops gradients that would increase the parameter.
        """
        log_scale: Tensor = _Limit.apply(self.bias.float() + INITIAL_LOG_SCALE, math.log(LARGEST_SCALE))
        return log_scale.exp()


class ContrastiveHead(Head):
    """Projects the CLS row of each image and the BOS row of each text, and normalises the features to length 1.

    Images and texts have separate linear layers without bias (paper section 3.1). The head returns features instead of
    a loss, because the loss compares all samples of a step (`Task.step_loss`). Parameters are replicated on all
    tensor-parallel ranks. `SequenceLayout.first_rows` selects the CLS and BOS rows.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel | None = None) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's configuration.
            tensor: the tensor-parallel group; unused, because the parameters are replicated.
        """
        super().__init__()
        self.image = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.text = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.temperature = Temperature()

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the features of a micro-batch, both in training and in an evaluation.

        Args:
            h_MD: CLS rows of images, then BOS rows of texts, (images + texts, hidden size).
            batch: the packed micro-batch; its targets, with one row per sample, are copied to the result.
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
        # A clamp has no gradient above its limit, so a scale above the limit could never decrease.
        return torch.where(ctx.beyond & (dx < 0), 0, dx), None

"""Defines the trainable visual tokenizer, which learns to reconstruct a teacher's features from codes."""

# B images, N patches per image, C width of a code, E width of the teacher's features.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import VisualTokenizerConfig
from beit3_ds.model import LossOutput, StageModel
from beit3_ds.tasks.visual_tokenizer.packing import TEACHER_FEATURES
from beit3_ds.tokenizers import VisualTokenizer


class TokenizerModel(VisualTokenizer, StageModel):
    """Trains a `VisualTokenizer` with the two loss terms of BEiT v2 (section 2.2): feature distance and commitment.

    Attributes:
        is_quantized: whether the decoder receives quantized vectors. If False, as in the first `continuous_steps`
            steps, the decoder receives the encoder's vectors.
        center: mean of the teacher's features, (features,), which is subtracted from the targets. Without the
            subtraction, a constant reconstruction would have a high cosine similarity.
    """

    center: Tensor

    def __init__(self, config: VisualTokenizerConfig, teacher_width: int, teacher_description: str) -> None:
        """Builds the networks and an empty codebook; `initialize` draws the initial values.

        Args:
            config: configuration of the tokenizer.
            teacher_width: number of features of the teacher.
            teacher_description: human-readable description of the teacher.
        """
        super().__init__(config, teacher_width, teacher_description)
        self.is_quantized = False
        self.register_buffer("center", torch.zeros(teacher_width))

    def initialize(self, seed: int) -> None:
        """Fills every parameter with its initial value, which depends only on the seed
        (`vit.initialize_linear_layers`).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = VisualTokenizer(self.config, self.teacher_width)
        self.load_state_dict(drawn.state_dict(), strict=False)

    def recompute_blocks(self) -> None:
        """Makes the backward pass recompute every block. This saves memory, and adds about a third of the compute."""
        self.encoder.recompute_blocks = self.decoder.recompute_blocks = True

    def forward(
        self,
        batch: PackedBatch,
        loss_factors: Tensor | None,
        x_TD: Tensor | None = None,
        layers: range | None = None,
    ) -> Any:
        """Returns the sums of the two loss terms, or the encoder's vectors of all patches.

        In training mode, quantization also adds the vectors to the running totals of the codebook.

        Args:
            batch: the images; needs the teacher's features if `loss_factors` is given.
            loss_factors: factor of each term's sum in the loss, (2,) float32; None returns vectors.
            x_TD: has no effect, because there are no pipeline stages.
            layers: has no effect, because there are no pipeline stages.

        Returns:
            With `loss_factors`, a `LossOutput` with two sums over all patches: the distance 1 - cos(reconstruction,
                teacher's features - `center`), and the commitment loss. Without `loss_factors`, the unit vectors before
                quantization, (images, patches, width) float32.
        """
        assert batch.pixels is not None, "the tokenizer's only stage has the pixels"
        vectors_BNC = self.project(batch.pixels)
        if loss_factors is None:
            return vectors_BNC
        commitment = vectors_BNC.new_zeros(())
        if self.is_quantized:
            vectors_BNC, distance_BN, _ = self.quantize(vectors_BNC)
            commitment = distance_BN.sum()
        target_BNE = batch.targets[TEACHER_FEATURES] - self.center
        cosine_BN = F.cosine_similarity(self.decode(vectors_BNC).float(), target_BNE, dim=-1)
        sums = torch.stack([(1 - cosine_BN).sum(), commitment])
        return LossOutput((sums * loss_factors).sum(), sums.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> "TokenizerModel":
        """Moves or casts the model, but keeps `center` in float32."""
        center = self.center
        super()._apply(fn, recurse)
        self.center = center.to(self.center.device)
        return self


def forward_flops(config: VisualTokenizerConfig, teacher_width: int, num_images: float) -> float:
    """Returns the floating-point operations of a forward pass of encoder and decoder; a multiply-add counts as 2.

    Args:
        config: configuration of the tokenizer.
        teacher_width: number of features of the teacher.
        num_images: number of images.
    """
    width, rows = config.hidden_size, 1 + config.grid_size**2
    block = 2 * 12 * width**2 + 4 * rows * width  # per row
    patch = 2 * 3 * config.patch_size**2 * width + 4 * width * (width + config.codebook_dim) + 2 * width * teacher_width
    layers = config.num_layers + config.decoder_layers
    return num_images * (rows * layers * block + config.grid_size**2 * patch)

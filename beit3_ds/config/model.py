"""Defines the section "model": the architecture of the Multiway Transformer, with named sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from beit3_ds.config.dense import DenseConfig
from beit3_ds.config.numbers import Decay, Epsilon, Layers, Range, Size, StandardDeviation, Vocabulary
from beit3_ds.config.strict import ConfigError, check_known_keys, load_section, show

MODEL_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 12, "hidden_size": 192, "ffn_hidden_size": 768, "num_attention_heads": 3, "patch_size": 16},
    "base": {
        "num_layers": 12,
        "hidden_size": 768,
        "ffn_hidden_size": 3072,
        "num_attention_heads": 12,
        "patch_size": 16,
    },
    "large": {
        "num_layers": 24,
        "hidden_size": 1024,
        "ffn_hidden_size": 4096,
        "num_attention_heads": 16,
        "patch_size": 16,
    },
    "giant": {
        "num_layers": 40,
        "hidden_size": 1408,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
"""Field values that `"size": NAME` expands to. "giant" is the model in the paper's Table 2 (224 px). "base" and "large"
are the sizes of the released models."""


InputKind = Literal["images", "pairs", "texts"]
"""Kind of input: images without text, image-text pairs, or texts without image."""

INPUT_KINDS: tuple[InputKind, ...] = ("images", "pairs", "texts")
"""All kinds of input, in the order in which `ModelConfig.inputs` stores them."""

FIELDS_WITHOUT_TENSORS = frozenset(
    {"drop_path_rate", "cross_entropy_chunk_size", "initial_embedding_std", "layer_norm_epsilon"}
)
"""Fields of `ModelConfig` that change neither the names nor the shapes of the model's tensors."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configures BEiT-3 and its two masked-modeling heads (paper, section 2.1); `inputs` selects the parts to build."""

    num_layers: Layers
    """Number of Multiway blocks."""
    hidden_size: Size
    """Hidden size D: number of features per patch or token."""
    ffn_hidden_size: Size
    """Hidden size F of each feed-forward expert."""
    num_attention_heads: Size
    """Number of attention heads; must divide `hidden_size`."""
    patch_size: Size
    """Side of an image patch in pixels; must divide `image_size`."""
    image_size: Size = 224
    """Side of the model's square input images in pixels."""
    layout: Literal["shared", "decoupled"] = "shared"
    """Which attention weights the modalities share. `shared`, the paper's layout, has one set of attention weights for
    all modalities. `decoupled`, the layout of the released models, has separate projections and norms for vision and
    language, with one softmax over all tokens."""
    num_vision_language_layers: Annotated[int, Range(0, 1000)] = 3
    """Number of top blocks that have a vision-language expert for pairs (paper: 3); must be 0 in the `decoupled`
    layout."""
    sub_layernorm: bool = False
    """Whether to add the inner LayerNorms and the initialization of Magneto (Wang et al., 2022, arXiv:2210.06423), as
    the released models do. Off by default, because the BEiT-3 paper mentions neither of them."""
    initial_embedding_std: StandardDeviation = 0.02
    """Standard deviation of the initial embeddings (BEiT: 0.02). They are drawn from a normal distribution that is
    truncated at one standard deviation. With `sub_layernorm`, a small model trained from scratch learns much faster
    with about 0.4."""
    layer_norm_epsilon: Epsilon = 1e-5
    """Epsilon that every LayerNorm adds to the variance."""
    drop_path_rate: Decay = 0.0
    """Stochastic-depth rate of the last block (paper, appendix: 0.1). The rates rise linearly from 0 in the first
    block."""
    text_vocab_size: Vocabulary = 64010
    """Number of rows of the word embedding and of the MLM head. Microsoft's BEiT-3 code has 64002 token ids, padded to
    64010 rows."""
    visual_vocab_size: Vocabulary = 8192
    """Number of classes of the MIM head; must equal the visual tokenizer's `codebook_size`."""
    max_text_length: Annotated[int, Range(4, 2**18)] = 128
    """Number of text positions, which is the maximum number of tokens per text, including BOS and EOS."""
    tie_word_embeddings: bool = False
    """Whether the MLM head uses the word embedding as its weight matrix; false in the released models. No effect if
    `inputs` is ["images"]."""
    final_norm: bool = True
    """Whether a LayerNorm follows the last block. Set it to false only for fine-tuned models that lack this norm."""
    inputs: tuple[InputKind, ...] = INPUT_KINDS
    """Kinds of input that the model accepts, in any order. Only the experts, embeddings and norms that these inputs
    need are built. `["images"]` gives a vision encoder, `["texts"]` a language encoder, `["pairs"]` a fusion encoder,
    and `["images", "texts"]` a dual encoder (paper, figure 3)."""
    dense: DenseConfig | None = None
    """Settings of a backbone that accepts images of any size, for detection and segmentation (docs/dense.md). Requires
    `inputs` = ["images"]. None builds the model for pretraining and all other tasks."""
    cross_entropy_chunk_size: Annotated[int, Range(2, 2**24)] = 128
    """Maximum number of text positions whose MLM logits are in memory at the same time. Each position has
    `text_vocab_size` logits."""

    @property
    def head_size(self) -> int:
        """Returns the number of features per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_pipeline_layers(self) -> int:
        """Returns the number of layers to divide over pipeline stages.

        The embeddings count as one layer, each block as one, and the final norm with the head as one.
        """
        return self.num_layers + 2

    @property
    def grid_size(self) -> int:
        """Returns the number of patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Returns the number of patches of an image of `image_size`."""
        return self.grid_size**2

    @property
    def image_rows(self) -> int:
        """Returns the sequence length of an image of `image_size`: its patches, plus CLS unless `dense` is set."""
        return self.num_patches + (self.dense is None)

    @property
    def window_size(self) -> int:
        """Returns the side of an attention window in patches (`dense.window_size`), or 0 without `dense`.

        With a positive size, the patches of an image are ordered window by window.
        """
        return 0 if self.dense is None else self.dense.window_size

    def block_window(self, layer: int) -> int:
        """Returns the side of the attention windows in block `layer` (0-based) in patches, or 0 without windows."""
        return 0 if self.dense is None else self.dense.block_window(layer)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Returns the modalities of the inputs, "vision" before "language". Pairs count for both modalities."""
        kinds = {"vision": ("images", "pairs"), "language": ("texts", "pairs")}
        return tuple(modality for modality in kinds if any(kind in self.inputs for kind in kinds[modality]))

    @property
    def has_tied_embedding(self) -> bool:
        """Returns whether the MLM head uses the word embedding as its weight matrix; False without language inputs."""
        return self.tie_word_embeddings and "language" in self.modalities

    def experts(self, layer: int) -> tuple[str, ...]:
        """Returns the names of the feed-forward experts of block `layer` (0-based), in the order of a batch's rows."""
        if layer < self.num_layers - self.num_vision_language_layers:
            return self.modalities
        owners = {"vision": "images", "vision_language": "pairs", "language": "texts"}
        return tuple(expert for expert, kind in owners.items() if kind in self.inputs)

    @property
    def attention_experts(self) -> tuple[str, ...]:
        """Returns the names of the sets of attention weights, which depend on `layout`.

        The shared layout has the set "shared". The decoupled layout has one set per modality, named after the modality.
        """
        return ("shared",) if self.layout == "shared" else self.modalities

    def __post_init__(self) -> None:
        if not self.inputs or len(set(self.inputs)) < len(self.inputs) or not set(self.inputs) <= set(INPUT_KINDS):
            raise ConfigError(
                f"model: inputs={show(self.inputs)} must hold at least one of {', '.join(INPUT_KINDS)}, and each at "
                "most once."
            )
        # Sorted, so that equal models have equal configurations.
        object.__setattr__(self, "inputs", tuple(kind for kind in INPUT_KINDS if kind in self.inputs))
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model: num_attention_heads={self.num_attention_heads} does not divide hidden_size="
                f"{self.hidden_size}. "
                f"{_nearest_divisors(self.hidden_size, self.num_attention_heads, 'heads')}"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model: patch_size={self.patch_size} does not divide image_size={self.image_size}. "
                f"{_nearest_divisors(self.image_size, self.patch_size, 'pixels per patch')}"
            )
        if self.dense is not None:
            self.dense.check(self.num_layers)
            if self.inputs != ("images",):
                raise ConfigError(
                    f"model: dense takes images alone, but inputs={show(list(self.inputs))}. Set model.inputs to "
                    '["images"]; weights of a model with more inputs load into it.'
                )
        if not 0 <= self.num_vision_language_layers <= self.num_layers:
            raise ConfigError(
                f"model: num_vision_language_layers={self.num_vision_language_layers} must be between 0 and "
                f"num_layers={self.num_layers}."
            )
        if self.layout == "decoupled" and self.num_vision_language_layers:
            raise ConfigError(
                "model: the decoupled layout has no vision-language expert; set num_vision_language_layers to 0 "
                f"(it is {self.num_vision_language_layers})."
            )


def load_model_section(mapping: Any, where: str) -> ModelConfig:
    """Loads the section "model", and expands `"size": NAME` to the field values in `MODEL_SIZES`.

    Args:
        mapping: JSON value of the section.
        where: dotted name of the section, for messages.

    Raises:
        ConfigError: if the size or a key is unknown, if a value is invalid, or if values contradict each other.
    """
    if isinstance(mapping, Mapping) and "size" in mapping:
        size = mapping["size"]
        if not isinstance(size, str) or size not in MODEL_SIZES:
            raise ConfigError(f"{where}.size: {show(size)} is not one of {', '.join(map(repr, MODEL_SIZES))}.")
        rest = {key: value for key, value in mapping.items() if key != "size"}
        check_known_keys(rest, [*ModelConfig.__dataclass_fields__, "size"], where)
        mapping = MODEL_SIZES[size] | rest
    return load_section(ModelConfig, mapping, where)


def _nearest_divisors(number: int, wanted: int, noun: str) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = max((d for d in divisors if d < wanted), default=None)
    above = min((d for d in divisors if d > wanted), default=None)
    choices = " or ".join(str(d) for d in (below, above) if d is not None)
    return f"The nearest that fit: {choices} {noun}."

"""Maps tensor names of BEiT-3's reference code (unilm/beit3 with torchscale 0.3.0) to this project's names.

In unilm, every tensor of a block exists twice: in branch A for vision and in branch B for language. If vision and
language have one common tensor in this project, it corresponds to two tensors of unilm, one per branch.
"""

import re

import torch

from beit3_ds.config import MODEL_SIZES, ConfigError, ModelConfig

Shapes = dict[str, torch.Size]

TEXT_POSITION = "embeddings.text_position"
POSITION_TABLES = {
    "beit3.encoder.embed_positions.A.weight": "embeddings.image_position",
    "beit3.encoder.embed_positions.B.weight": TEXT_POSITION,
}
"""Maps unilm's names of position tables to this project's names.

unilm does not use the first `UNUSED_POSITIONS` rows of its tables.
"""
UNUSED_POSITIONS = 2
TEXT_POSITION_ROWS = 1024
"""Number of rows in unilm's text position table, including unused rows."""
TOKENS = {
    "beit3.vision_embed.cls_token": "embeddings.cls_token",
    "beit3.vision_embed.mask_token": "embeddings.mask_token",
}
"""Maps unilm's names of the CLS and mask tokens, (1, 1, hidden size), to this project's names, (hidden size,)."""

_IMAGE_TABLE, _TEXT_TABLE = POSITION_TABLES
_EMBEDDINGS = {
    "A": {
        "beit3.vision_embed.proj.weight": "embeddings.patch.weight",
        "beit3.vision_embed.proj.bias": "embeddings.patch.bias",
        **TOKENS,
        _IMAGE_TABLE: POSITION_TABLES[_IMAGE_TABLE],
    },
    "B": {"beit3.text_embed.weight": "embeddings.word.weight", _TEXT_TABLE: TEXT_POSITION},
}
"""Maps unilm's names of embedding tensors to this project's names, for branch A (vision) and branch B (language)."""
_HEADS = {"A": ("mim_head", "heads.mim"), "B": ("mlm_head", "heads.mlm")}
_ATTENTION = {
    "self_attn_layer_norm": "norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.inner_attn_ln": "sub_norm",
    "self_attn.out_proj": "out_proj",
}
_FFN = {"final_layer_norm.X": "norm", "ffn.X.fc1": "fc1", "ffn.X.ffn_layernorm": "sub_norm", "ffn.X.fc2": "fc2"}
_FINAL_NORM = "beit3.encoder.layer_norm."
_SUB_NORMS = (".inner_attn_ln.", ".ffn_layernorm.")
_LAYER = re.compile(r"beit3\.encoder\.layers\.(\d+)\.")
_HEAD_SIZE = 64  # width of an attention head in the released sizes; a file does not hold it


def reference_branches(config: ModelConfig, *, fusion: bool = False) -> dict[str, str]:
    """Maps the names of unilm's branches to their modalities: "A" to "vision", and "B" to "language".

    A branch is only included if all blocks of the model have it.

    Args:
        config: configuration of the model.
        fusion: whether a block with a vision-language expert counts as a block with both branches.
    """
    letters = {"A": "vision", "B": "language"}
    owned = [
        {*letters.values()} if fusion and "vision_language" in experts else {*experts}
        for experts in map(config.experts, range(config.num_layers))
    ]
    return {
        letter: modality
        for letter, modality in letters.items()
        if modality in config.modalities and all(modality in experts for experts in owned)
    }


def reference_keys(config: ModelConfig, *, fusion: bool = False) -> dict[str, str]:
    """Maps each tensor name of unilm to this project's name, such as `mim_head.bias` to `heads.mim.bias`.

    In unilm, branch A (vision) is in all blocks or in none, and so is branch B (language). If a block of this project's
    model has no vision expert, all names of branch A are therefore left out. If a block has no language expert, all
    names of branch B are left out. With `fusion`, a block with a vision-language expert counts as having a vision
    expert and a language expert.

    Args:
        config: configuration of the model.
        fusion: True maps the FFN tensors of both branches to the vision-language expert, in blocks that have this
            expert.
    """
    kinds, attention = ("weight", "bias"), config.attention_experts
    letters = reference_branches(config, fusion=fusion)
    keys = {key: name for letter in letters for key, name in _EMBEDDINGS[letter].items()}
    for letter, expert in letters.items():
        shared = attention[0] if attention == ("shared",) else expert
        keys |= {f"{_FINAL_NORM}{letter}.{kind}": f"norm.{kind}_{shared}" for kind in kinds}
        for layer in range(config.num_layers):
            theirs, ours = f"beit3.encoder.layers.{layer}", f"blocks.{layer}"
            own = "vision_language" if fusion and "vision_language" in config.experts(layer) else expert
            for kind in kinds:
                for key, name in _ATTENTION.items():
                    keys[f"{theirs}.{key}.{letter}.{kind}"] = f"{ours}.attention.{name}.{kind}_{shared}"
                for key, name in _FFN.items():
                    keys[f"{theirs}.{key.replace('X', letter)}.{kind}"] = f"{ours}.ffn.{name}.{kind}_{own}"
    heads = [_HEADS[letter] for letter in letters]
    keys |= {f"{key}.{kind}": f"{name}.{kind}" for key, name in heads for kind in kinds}
    if config.has_tied_embedding and "B" in letters:
        keys["mlm_head.weight"] = "embeddings.word.weight"
    if not config.sub_layernorm:
        keys = {key: name for key, name in keys.items() if "sub_norm" not in name}
    return keys


def reference_arguments(config: ModelConfig) -> dict[str, object]:
    """Returns arguments for torchscale's `EncoderConfig`, to build unilm's model for exported weights."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "vocab_size": config.text_vocab_size,
        "multiway": True,
        "layernorm_embedding": False,
        "normalize_output": config.final_norm,
        "no_output_layer": True,
        "encoder_embed_dim": config.hidden_size,
        "encoder_attention_heads": config.num_attention_heads,
        "encoder_ffn_embed_dim": config.ffn_hidden_size,
        "encoder_layers": config.num_layers,
        "max_source_positions": max(TEXT_POSITION_ROWS, UNUSED_POSITIONS + config.max_text_length),
        "layernorm_eps": config.layer_norm_epsilon,
        "subln": config.sub_layernorm,
    }


def read_architecture(shapes: Shapes, where: str) -> ModelConfig:
    """Derives the configuration of a model from the tensor shapes of a file in unilm's format.

    The shapes do not determine the number of attention heads. A hidden size in `MODEL_SIZES` has the number of heads
    listed there; with any other hidden size, a head has 64 features. Without a `mim_head`, the number of visual codes
    is the default.

    Args:
        shapes: shape of every tensor, by unilm's names.
        where: name of the file, for messages.

    Raises:
        ConfigError: if a tensor that determines a size is missing, if the sizes contradict each other, or if the hidden
            size is neither in `MODEL_SIZES` nor a multiple of 64.
    """
    image_table, text_table = POSITION_TABLES
    try:
        text_vocab_size, hidden_size = shapes["beit3.text_embed.weight"]
        patch_size = shapes["beit3.vision_embed.proj.weight"][2]
        ffn_hidden_size = shapes["beit3.encoder.layers.0.ffn.A.fc1.weight"][0]
        num_patches = shapes[image_table][0] - UNUSED_POSITIONS - 1
        max_text_length = shapes[text_table][0] - UNUSED_POSITIONS
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{where} is not BEiT-3 in its released format ({error!r}). Use a released file.") from error
    grid_size = round(max(num_patches, 0) ** 0.5)
    if grid_size**2 != num_patches:
        raise ConfigError(f"{where}: {num_patches} patches do not form a square grid. Use a released file.")
    named = (size["num_attention_heads"] for size in MODEL_SIZES.values() if size["hidden_size"] == hidden_size)
    if not (num_attention_heads := next(named, hidden_size // _HEAD_SIZE if hidden_size % _HEAD_SIZE == 0 else 0)):
        raise ConfigError(
            f"{where}: no released size has {hidden_size} features, and the file does not state the number of "
            f"attention heads. It is known only for a multiple of {_HEAD_SIZE} features. Use a released file."
        )
    return ModelConfig(
        num_layers=1 + max(int(match[1]) for match in map(_LAYER.match, shapes) if match),
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        patch_size=patch_size,
        image_size=grid_size * patch_size,
        layout="decoupled",
        num_vision_language_layers=0,
        sub_layernorm=any(norm in key for key in shapes for norm in _SUB_NORMS),
        final_norm=any(key.startswith(_FINAL_NORM) for key in shapes),
        text_vocab_size=text_vocab_size,
        visual_vocab_size=shapes.get("mim_head.weight", [ModelConfig.visual_vocab_size])[0],
        max_text_length=max_text_length,
    )

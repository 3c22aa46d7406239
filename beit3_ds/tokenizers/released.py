"""Imports the released visual tokenizers of BEiT v2, such as `vqkd_encoder_base_decoder_3x768x12_clip`.

The import follows the published description of the networks, and was never tested with the released files.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.config import ConfigError, TeacherConfig, VisualTokenizerConfig
from beit3_ds.positions import grid_size_of, interpolate_positions
from beit3_ds.tokenizers.teacher import describe_teacher
from beit3_ds.tokenizers.visual import VisualTokenizer
from beit3_ds.untrusted_file import read_tensors

_HEAD_SIZE = 64  # the file does not contain it; every size of ViT has 64
_TEACHER = "open_clip:ViT-B-16-quickgelu/openai"  # OpenAI's CLIP, in open_clip's words
_FOREIGN_PREFIXES = ("teacher_model.", "scaling_layer.", "loss")
_UNUSED = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.embedding.initted")


def import_released_tokenizer(
    source: str | Path, target: str | Path, *, image_size: int | None = None, teacher: str = _TEACHER
) -> VisualTokenizer:
    """Converts a released VQ-KD file to a visual tokenizer, which `save_visual_tokenizer` can write.

    Args:
        source: path of the released .pth file, which is read with `weights_only`.
        target: path where the tokenizer will be saved; stored in the tokenizer's config.
        image_size: side of the tokenizer's input images in pixels; None keeps the file's 224. Position embeddings are
            interpolated to this size. The tokenizer and the BEiT-3 model of a run must have the same number of patches
            along one side. For example, a model with 14 px patches and 224 px images has 16 patches along one side. The
            tokenizer has 16 px patches, so it needs 256 px images.
        teacher: name of the teacher in the tokenizer's description; the default is the teacher of the `_clip` files.

    Raises:
        ConfigError: if the file cannot be read, if the codebook is not trained, or if the tensors do not match.
    """
    released = read_tensors(source)
    try:
        config, state = convert_released_state(released, target, image_size=image_size)
        width = len(state["decode_task_layer.2.bias"])
        tokenizer = VisualTokenizer(config, width, describe_teacher(TeacherConfig(teacher=teacher)))
        tokenizer.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"{source} is not a VQ-KD tokenizer of BEiT v2: {error}") from error
    return tokenizer.eval().requires_grad_(False)


def convert_released_state(
    released: dict[str, Tensor], target: str | Path, *, image_size: int | None
) -> tuple[VisualTokenizerConfig, dict[str, Tensor]]:
    """Renames the tensors of a released state dict, and derives the architecture from the tensors' shapes.

    In the released networks, queries and values have separate biases, keys have no bias, and the last norm is named
    `fc_norm`. The moving averages `quantize.embedding.cluster_size` and `quantize.embedding.embed_avg` are dropped,
    because this project's codebook update does not use them.

    Args:
        released: tensors of the released file, by name.
        target: path where the tokenizer will be saved.
        image_size: side in pixels of the images that the tokenizer gets; None keeps the size of the released tokenizer.

    Returns:
        The tokenizer's config and state dict.

    Raises:
        ConfigError: if the codebook was never initialised, or its codes are not unit vectors.
        KeyError: if a tensor that determines the architecture is missing.
    """
    released = {name: value for name, value in released.items() if not name.startswith(_FOREIGN_PREFIXES)}
    _check_codebook(released["quantize.embedding.weight"], released["quantize.embedding.initted"])
    state = {"quantize.weight": released.pop("quantize.embedding.weight"), "quantize.started": torch.tensor(True)}
    for name, value in released.items():
        if name in _UNUSED or name.endswith(".attn.v_bias"):
            continue
        if name.endswith(".attn.q_bias"):
            value_bias = released[name.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), value_bias])
        else:
            state[name.replace(".fc_norm.", ".norm.")] = value
    hidden_size, _, patch_size, _ = state["encoder.patch_embed.proj.weight"].shape
    grid_size = grid_size_of(state["encoder.pos_embed"])
    codebook_size, codebook_dim = state["quantize.weight"].shape
    config = VisualTokenizerConfig(
        path=str(target),
        image_size=image_size or grid_size * patch_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=_num_blocks(state, "encoder"),
        decoder_layers=_num_blocks(state, "decoder"),
        num_attention_heads=hidden_size // _HEAD_SIZE,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
    )
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        state[name] = interpolate_positions(state[name], config.grid_size)
    return config, state


def _check_codebook(codes: Tensor, started: Tensor) -> None:
    if not started.is_meta and not started.bool().all():
        raise ConfigError("the codebook was never initialised, so this tokenizer is not trained. Use a released file.")
    lengths = codes.norm(dim=-1)
    if not codes.is_meta and not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
        raise ConfigError(
            f"the codes have lengths from {lengths.min():.3f} to {lengths.max():.3f}, but codes of VQ-KD have "
            f"length 1. Use a released file."
        )


def _num_blocks(state: dict[str, Tensor], network: str) -> int:
    found = (re.match(rf"{network}\.blocks\.(\d+)\.", name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)

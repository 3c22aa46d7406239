"""Plans the export of a model to the format of BEiT-3's reference code (unilm/beit3 with torchscale 0.3.0)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.model.pretrained import EXTRA_PREFIX, REPLACEABLE
from beit3_ds.weights.planned_tensor import PlannedTensor, plan_copy, read_blocks
from beit3_ds.weights.reader import WeightReader
from beit3_ds.weights.unilm_heads import LOG_SCALE, LOG_SCALE_KEY, export_log_scale, head_keys
from beit3_ds.weights.unilm_names import (
    POSITION_TABLES,
    TEXT_POSITION_ROWS,
    TOKENS,
    UNUSED_POSITIONS,
    reference_branches,
    reference_keys,
)


def plan_unilm_export(reader: WeightReader, *, fusion: bool) -> list[PlannedTensor]:
    """Plans all tensors of unilm's state dict, including the task head of the weights.

    unilm's model has two branches, A and B, and no vision-language expert. For a model with vision-language experts, no
    single export is exact for all inputs:

    * "dual" is exact for single images and single texts: A is the vision expert and B the language expert.
    * "fusion" is exact for image-text pairs: in the top blocks, A and B are equal copies of the vision-language expert.

    For a model without vision-language experts, "dual" is exact for all inputs.

    Tensors with the prefix `EXTRA_PREFIX` get their original keys.

    Args:
        reader: reader of the weights.
        fusion: whether to plan the "fusion" export instead of the "dual" export.

    Raises:
        ConfigError: if the model lacks the experts for the export. The "fusion" export needs vision-language experts.
            The "dual" export needs vision experts in all blocks or language experts in all blocks. A model that accepts
            only pairs cannot be exported as "dual", because its top blocks have neither kind of expert.
    """
    has_fused_expert = any("vision_language" in reader.model.experts(layer) for layer in range(reader.model.num_layers))
    if fusion and not has_fused_expert:
        raise ConfigError(
            "unilm-fusion: the model has no vision-language expert, so unilm-dual is exact for images, texts and "
            "pairs. Use --format unilm-dual."
        )
    if not reference_branches(reader.model, fusion=fusion):
        raise ConfigError(
            "unilm-dual: the model takes pairs alone, so its top blocks have neither a vision nor a language expert. "
            "Use --format unilm-fusion."
        )
    held = set(reader.names())
    planned = []
    for key, name in (reference_keys(reader.model, fusion=fusion) | head_keys(held)).items():
        if name in held or not name.startswith(REPLACEABLE):
            planned.append(_plan_tensor(reader, key, name, held))
    own_keys = {tensor.name for tensor in planned}
    extras = [name for name in held if name.startswith(EXTRA_PREFIX)]
    for name in sorted(extras):
        if (key := name.removeprefix(EXTRA_PREFIX)) not in own_keys:
            planned.append(plan_copy(reader, name)._replace(name=key))
    return planned


def _plan_tensor(reader: WeightReader, key: str, name: str, held: set[str]) -> PlannedTensor:
    if key in POSITION_TABLES:
        return _plan_positions(reader, key, name, held)
    if key == LOG_SCALE_KEY:
        return _plan_log_scale(reader, held)
    tensor = plan_copy(reader, name)._replace(name=key)
    if key not in TOKENS:
        return tensor
    return tensor._replace(shape=(1, 1, *tensor.shape))


def _plan_log_scale(reader: WeightReader, held: set[str]) -> PlannedTensor:
    """Plans unilm's `logit_scale`, the logarithm of the factor that scales similarities.

    If the weights were imported from unilm's format, the original value is copied bit for bit. Otherwise, the value is
    computed from this project's parameter.

    Args:
        reader: the weights to export.
        held: names of all tensors in the weights.
    """
    if (imported := EXTRA_PREFIX + LOG_SCALE_KEY) in held:
        return plan_copy(reader, imported)._replace(name=LOG_SCALE_KEY)
    return PlannedTensor(LOG_SCALE_KEY, reader.dtype(LOG_SCALE), (), lambda: [export_log_scale(reader.read(LOG_SCALE))])


def _plan_positions(reader: WeightReader, key: str, name: str, held: set[str]) -> PlannedTensor:
    """Plans a position table in unilm's form, which has unused rows at its start and end."""
    (rows, width), dtype, unused = reader.shape(name), reader.dtype(name), EXTRA_PREFIX + key
    imported = unused in held
    filler = 0 if imported or name != "embeddings.text_position" else TEXT_POSITION_ROWS - UNUSED_POSITIONS - rows

    def blocks() -> Iterator[Tensor]:
        yield reader.read(unused) if imported else torch.zeros(UNUSED_POSITIONS, width, dtype=dtype)
        yield from read_blocks(reader, name)
        yield torch.zeros(max(filler, 0), width, dtype=dtype)

    return PlannedTensor(key, dtype, (UNUSED_POSITIONS + rows + max(filler, 0), width), blocks)

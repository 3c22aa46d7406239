"""Plans the export of a model's vision tower to a timm model, such as `beit3_base_patch16_224`."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from beit3_ds.config import MODEL_SIZES, ConfigError, ModelConfig
from beit3_ds.weights.planned_tensor import PlannedTensor, plan_copy, read_blocks
from beit3_ds.weights.reader import WeightReader
from beit3_ds.weights.timm_names import timm_names
from beit3_ds.weights.unilm_names import reference_branches

_NAMED = {
    "beit3_base_patch16_224": MODEL_SIZES["base"],
    "beit3_large_patch16_224": MODEL_SIZES["large"],
    "beit3_giant_patch14_224": MODEL_SIZES["giant"],
}
_SIZES = {
    "embed_dim": "hidden_size",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
}
_IMAGE_SIZE, _EPSILON = 224, 1e-5  # the same in all these models; every norm has this epsilon
_BATCH_DIMS = {"cls_token": 2, "pos_embed": 1}
"""Maps timm's name of a tensor to the number of leading dimensions of size 1 that this project's tensor lacks."""


def plan_timm_export(reader: WeightReader) -> list[PlannedTensor]:
    """Plans all tensors of timm's model without a classifier.

    In timm's model, the final norm has the name `fc_norm`. `forward_features` does not apply it; it is applied later,
    to the mean of the patches.

    Raises:
        ConfigError: if the model has no vision tower or no final norm, or its norms have another epsilon than timm's.
    """
    config = reader.model
    if "A" not in reference_branches(config):
        raise ConfigError(
            f"timm: a model for {' and '.join(config.inputs)} alone has no vision expert in some of its blocks, so it "
            "has no vision tower. Export a model that takes images."
        )
    if config.layer_norm_epsilon != _EPSILON:
        raise ConfigError(
            f"timm: the model has layer_norm_epsilon={config.layer_norm_epsilon:g}, but timm's models have "
            f"{_EPSILON:g}. Use another format."
        )
    shared = config.attention_experts[0]
    if f"norm.weight_{shared}" not in reader.names():
        raise ConfigError(
            "timm: the weights were fine-tuned without a final norm, but timm's model has one. Export pretrained "
            "weights."
        )
    return [_plan_tensor(reader, key, names) for key, names in timm_names(config).items()]


def timm_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns arguments for `timm.create_model`: the name of timm's most similar model, and settings that differ."""
    same_width = (name for name, size in _NAMED.items() if size["hidden_size"] == config.hidden_size)
    name = next(same_width, "beit3_base_patch16_224")
    size = _NAMED[name]
    arguments: dict[str, Any] = {"model_name": name, "num_classes": 0}
    arguments |= {key: getattr(config, ours) for key, ours in _SIZES.items() if getattr(config, ours) != size[ours]}
    if config.ffn_hidden_size * size["hidden_size"] != size["ffn_hidden_size"] * config.hidden_size:
        arguments["mlp_ratio"] = (config.ffn_hidden_size + 0.5) / config.hidden_size  # timm rounds the product down
    if config.image_size != _IMAGE_SIZE:
        arguments["img_size"] = config.image_size
    if not config.sub_layernorm:
        arguments |= {"scale_attn_norm": False, "scale_mlp_norm": False}
    return arguments


def timm_example(config: ModelConfig, path: str) -> str:
    """Returns example code that loads an exported file in timm and computes the features of `BEiT3.encode`."""
    arguments = timm_arguments(config) | {"checkpoint_path": path}
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return (
        "import timm\n"
        "from beit3_ds.preprocess import preprocess\n"
        f"model = timm.create_model({call}).eval()\n"
        f'images = preprocess("photo.jpg", {config.image_size})[None]\n'
        "features = model.fc_norm(model.forward_features(images))"
    )


def _plan_tensor(reader: WeightReader, key: str, names: tuple[str, ...]) -> PlannedTensor:
    if len(names) > 1:
        return _joined(reader, key, list(names))
    if dims := _BATCH_DIMS.get(key, 0):
        return plan_copy(reader, names[0])._replace(name=key, shape=(1,) * dims + tuple(reader.shape(names[0])))
    return plan_copy(reader, names[0])._replace(name=key)


def _joined(reader: WeightReader, key: str, names: list[str]) -> PlannedTensor:
    rows, *rest = reader.shape(names[0])
    shape = (len(names) * rows, *rest)

    def blocks() -> Iterator[Tensor]:
        return chain.from_iterable(read_blocks(reader, name) for name in names)

    return PlannedTensor(key, reader.dtype(names[0]), shape, blocks)

"""Maps the tensor names of timm's BEiT-3 vision towers to this project's names."""

from beit3_ds.config import ModelConfig

_EMBEDDINGS = {
    "patch_embed.proj.weight": "embeddings.patch.weight",
    "patch_embed.proj.bias": "embeddings.patch.bias",
}
_ATTENTION = {"norm1": "norm", "attn.norm": "sub_norm", "attn.proj": "out_proj"}
_FFN = {"norm2": "norm", "mlp.fc1": "fc1", "mlp.norm": "sub_norm", "mlp.fc2": "fc2"}


def timm_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Maps each tensor name of timm to one or several names of this project.

    If there are several names, timm's tensor is the concatenation of the named tensors along the first dimension.
    """
    shared = config.attention_experts[0]  # "shared" or "vision"
    names: dict[str, tuple[str, ...]] = {
        "cls_token": ("embeddings.cls_token",),
        "pos_embed": ("embeddings.image_position",),
        **{key: (name,) for key, name in _EMBEDDINGS.items()},
    }
    for kind in ("weight", "bias"):
        names[f"fc_norm.{kind}"] = (f"norm.{kind}_{shared}",)
        for layer in range(config.num_layers):
            block = f"blocks.{layer}"
            own = {key: f"attention.{name}.{kind}_{shared}" for key, name in _ATTENTION.items()}
            own |= {key: f"ffn.{name}.{kind}_vision" for key, name in _FFN.items()}
            for key, name in own.items():
                if config.sub_layernorm or "sub_norm" not in name:
                    names[f"{block}.{key}.{kind}"] = (f"{block}.{name}",)
            parts = tuple(f"{block}.attention.{part}_proj.{kind}_{shared}" for part in "qkv")
            names[f"{block}.attn.qkv.{kind}"] = parts
    return names

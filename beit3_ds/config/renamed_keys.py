"""Lists the configuration keys that version 0.1 had under other names or in other sections."""

from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {
    "heldout": "validation",
    "prepared_dir": "cache_dir",
    "initial_weights": "init_from",
    "kernels": "kernel_backend",
}
"""Maps old key names to new ones. Error messages about an old name give the new name (docs/configuration.md)."""

MOVED_KEYS = {
    "image_mask_ratio": "data",
    "text_mask_ratio": "data",
    "pair_text_mask_ratio": "data",
    "text_masking": "data",
    "loss_weights": "training",
}
"""Maps each key that moved into the section "task" to its former section."""

TOKENIZER_KEYS = {
    **{key: f"task.{key}" for key in ("commitment_weight", "teacher", "teacher_weights", "teacher_stage")},
    "continuous_steps": "task.continuous_steps",
    "training_steps": "training.total_steps",
    "batch_size": "data.images.samples_per_step",
    **{key: f"training.{key}" for key in ("learning_rate", "min_learning_rate", "weight_decay", "warmup_steps")},
    "save_interval": "training.save_interval",
    "bf16": "bf16.enabled",
}
"""Maps removed keys of the section "tokenizers.visual" to their replacements. The replacements are keys for a run that
trains a tokenizer."""


def with_new_keys(config: Any) -> Any:
    """Returns an old checkpoint's configuration with the current names and sections of keys. `TOKENIZER_KEYS` are left
    out.
    """
    renamed = _rename(config)
    if not isinstance(renamed, dict):
        return renamed
    _drop_tokenizer_keys(renamed)
    moved = {}
    for key, section in MOVED_KEYS.items():
        if isinstance(renamed.get(section), dict) and key in renamed[section]:
            moved[key] = renamed[section].pop(key)
    return renamed | {"task": {"name": "pretraining", **moved}} if moved else renamed


def without_tokenizer_keys(visual: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a "tokenizers.visual" section without the keys of version 0.1 that configured the tokenizer's training."""
    return {key: value for key, value in visual.items() if key not in TOKENIZER_KEYS}


def _drop_tokenizer_keys(config: dict[str, Any]) -> None:
    tokenizers = config.get("tokenizers")
    if isinstance(tokenizers, dict) and isinstance(tokenizers.get("visual"), dict):
        tokenizers["visual"] = without_tokenizer_keys(tokenizers["visual"])


def _rename(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(key, key): _rename(inner) for key, inner in value.items()}
    return [_rename(inner) for inner in value] if isinstance(value, list) else value

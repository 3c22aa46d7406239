"""Lists the keys of a run's file that had another name or section in version 0.1."""

from typing import Any

RENAMED_KEYS = {"heldout": "validation", "prepared_dir": "cache_dir", "initial_weights": "init_from"}
"""New names by old names. An old name in a run's file is an error that gives the new one (docs/configuration.md)."""

MOVED_KEYS = {
    "image_mask_ratio": "data",
    "text_mask_ratio": "data",
    "pair_text_mask_ratio": "data",
    "text_masking": "data",
    "loss_weights": "training",
}
"""Keys that moved to the section "task", with their old section. A key in its old section is an error that says so."""


def with_new_keys(config: Any) -> Any:
    """Returns an old checkpoint's configuration with its keys under their current names and sections."""
    renamed = _rename(config)
    if not isinstance(renamed, dict):
        return renamed
    moved = {}
    for key, section in MOVED_KEYS.items():
        if isinstance(renamed.get(section), dict) and key in renamed[section]:
            moved[key] = renamed[section].pop(key)
    return renamed | {"task": {"name": "pretraining", **moved}} if moved else renamed


def _rename(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(key, key): _rename(inner) for key, inner in value.items()}
    return [_rename(inner) for inner in value] if isinstance(value, list) else value

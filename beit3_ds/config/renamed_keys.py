"""Lists the keys of a run's file that had another name in version 0.1."""

from typing import Any

RENAMED_KEYS = {"heldout": "validation", "prepared_dir": "cache_dir", "initial_weights": "init_from"}
"""New names by old names. An old name in a run's file is an error that gives the new one (docs/configuration.md)."""


def with_new_keys(value: Any) -> Any:
    """Returns JSON data with new names for old keys, e.g. the configuration in an old checkpoint."""
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(key, key): with_new_keys(inner) for key, inner in value.items()}
    return [with_new_keys(inner) for inner in value] if isinstance(value, list) else value

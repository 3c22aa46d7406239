"""Records the training settings (recipe) of a tokenizer, so that no tokenizer is overwritten by accident.

Checkpoints depend on their tokenizer, and a retrained tokenizer may have other ids even with equal settings.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.regular_file import read_regular
from beit3_ds.untrusted_json import MAX_JSON_BYTES, check_list, check_object, parse_untrusted_json

Recipe = dict[str, Any]
"""Training settings of a tokenizer as JSON values, keyed by their names in the config."""

FREE_TO_CHANGE = ("path", "encoding_dtype")
"""Keys of a tokenizer's config section that do not affect the trained tokenizer."""


def text_recipe(config: RunConfig) -> Recipe:
    """Returns the recipe of a run's text tokenizer: all settings that affect the trained tokenizer."""
    return _recipe(config, config.tokenizers.text, ("texts", "pairs"), {})


def visual_recipe(config: RunConfig, settings: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of a visual tokenizer: all settings that affect the trained tokenizer.

    Settings that existed in version 0.1 keep the keys of that version.

    Args:
        config: config of the run that trains the tokenizer.
        settings: settings in the task section of that run.
    """
    training = config.training
    fields = ("learning_rate", "min_learning_rate", "weight_decay", "warmup_steps", "adam_betas", "adam_epsilon")
    recipe = {name: getattr(training, name) for name in fields} | dict(settings)
    recipe |= {"training_steps": training.total_steps, "batch_size": config.data.images.samples_per_step}
    return _recipe(config, config.tokenizers.visual, ("images",), recipe | {"bf16": config.options.is_bf16})


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describes the differences between two recipes (training settings) as "KEY from OLD to NEW".

    Returns an empty string if there are no differences. Keys in only one recipe are ignored, because versions of this
    project record different keys.
    """
    before = {key: _plain_value(value) for key, value in before.items()}
    changed = [key for key in before if key in now and before[key] != now[key]]
    return ", ".join(f"{key} from {before[key]!r} to {now[key]!r}" for key in changed)


def save_with_recipe(path: str | Path, content: bytes, recipe: Recipe) -> None:
    """Writes a tokenizer to `path`, and its training settings (recipe) to `PATH.recipe.json`.

    Creates the folder if needed.

    Raises:
        OSError: if a file cannot be written; existing files are then kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "recipe": recipe}
    with atomic_write(path) as file, atomic_write(_recipe_path(path)) as recipe_file:
        recipe_file.write((json.dumps(record, indent=2) + "\n").encode())
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the recipe gets its name


def is_trained(section: str, path: str | Path, recipe: Recipe, read_known: Callable[[], Recipe]) -> bool:
    """Returns whether a tokenizer exists at `path`, and checks that it was trained with the given settings.

    Args:
        section: section of the config, such as "tokenizers.text".
        path: path of the tokenizer.
        recipe: training settings that the tokenizer must have.
        read_known: function that reads some training settings from the tokenizer's file; used if no recipe was
            recorded.

    Raises:
        ConfigError: if the file is not a tokenizer, or the tokenizer was trained with other settings. The message names
            the differences.
    """
    if not Path(path).is_file():
        return False
    way_out = (
        f"Undo the change to use it, name another {section}.path, or retrain it with --force: checkpoints of runs that "
        "used it are then refused."
    )
    try:
        before = _read_recipe(path) or read_known()
    except ConfigError as error:
        raise ConfigError(
            f"{error} The file is there: name another {section}.path, or overwrite it with --force."
        ) from None
    if changes := find_changes(before, recipe):
        raise ConfigError(f"{section}: {path} was trained with another recipe: {changes}. {way_out}")
    return True


def check_can_be_written(section: str, path: str | Path) -> None:
    """Checks before training that a tokenizer's file can be written; creates the folder if needed.

    Args:
        section: section of the config, such as "tokenizers.text", for messages.
        path: path of the tokenizer.

    Raises:
        ConfigError: if the file cannot be written, or `path` is a folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, keep=False) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigError(
            f"{section}.path={path} cannot be written: {error}. Fix its folder, make room, or name another file."
        ) from None


def describe_trained(section: str, path: str | Path) -> str:
    """Returns a message that the tokenizer is already trained."""
    return f"{section}: {path} is already trained with this recipe; nothing is done. --force retrains it"


def _recipe(config: RunConfig, section: Any, streams: tuple[str, ...], training: Mapping[str, Any]) -> Recipe:
    fields = {key: value for key, value in dataclasses.asdict(section).items() if key not in FREE_TO_CHANGE}
    named = config.data.streams()
    files = {
        f"{stream}.train": [_plain_source(dataclasses.asdict(source)) for source in named[stream].train]
        for stream in streams
    }
    # Converted through JSON, which has no tuples, so that a saved recipe equals a new one.
    recipe: Recipe = json.loads(json.dumps(fields | dict(training) | files | {"seed": config.training.seed}))
    return recipe


def _plain_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a data source without unset keys, so that new optional keys do not change recipes."""
    return {key: value for key, value in source.items() if value not in (None, "", (), 0, False)}


def _plain_value(value: Any) -> Any:
    """Converts a recorded value to the current form.

    Drops keys of data sources with the value null. In version 0.1, such a key meant that the user had not set it.
    """
    if isinstance(value, list):
        return [_plain_source(item) if isinstance(item, dict) else item for item in value]
    return value


def _read_recipe(path: str | Path) -> Recipe | None:
    """Returns the recorded recipe of a tokenizer; None if there is no record, or the record belongs to another file."""
    try:
        content = check_object(parse_untrusted_json(read_regular(_recipe_path(path), MAX_JSON_BYTES)))
        recipe: Recipe = check_object(content["recipe"])
        if "images.train" in recipe and "pairs.train" in recipe:
            images, pairs = check_list(recipe["images.train"]), check_list(recipe.pop("pairs.train"))
            recipe["images.train"] = _merge_sources([*map(check_object, images)], [*map(check_object, pairs)])
        return recipe if content["sha256"] == _digest(Path(path)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _merge_sources(images: list[Any], pairs: list[Any]) -> list[Any]:
    """Joins the image and pair sources of a recipe from version 0.1.

    Drops sampling weights and duplicate sources. Version 0.1 ignored both.
    """
    merged: list[Any] = []
    for source in (*images, *pairs):
        unweighted = {key: value for key, value in source.items() if key != "weight"}
        if unweighted not in merged:
            merged.append(unweighted)
    return merged


def _recipe_path(path: str | Path) -> Path:
    return Path(f"{path}.recipe.json")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

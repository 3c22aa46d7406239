"""Weights written out for others to load: this project's own format, the reference's, and timm's."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from beit3_ds.checkpoint.disk import rename, sync_folder, write_whole
from beit3_ds.checkpoint.tensor_file import TensorEntry, write_tensor_file
from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.model.pretrained import EXTRA_PREFIX, INDEX_NAME, is_pretrained_file, weights_metadata
from beit3_ds.weights.export_note import NOTE_KEY, ExportNote
from beit3_ds.weights.recipe import Recipe, copy_recipe
from beit3_ds.weights.source import TensorSource
from beit3_ds.weights.state_dict_file import write_state_dict_file
from beit3_ds.weights.timm_recipes import timm_recipe_lines, timm_recipes
from beit3_ds.weights.unilm_layout import reference_arguments
from beit3_ds.weights.unilm_recipes import unilm_recipes

ExportFormat = Literal["beit3", "unilm-dual", "unilm-fusion", "timm"]

_SHARD_NAME = re.compile(r"model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


class Exported(NamedTuple):
    """What was written."""

    num_tensors: int
    num_bytes: int
    """Of all files."""
    num_files: int
    """The index of shards not counted."""

    def describe(self) -> str:
        """The three numbers in words."""
        files = "" if self.num_files == 1 else f" in {self.num_files} files"
        return f"{self.num_tensors} tensors, {format_bytes(self.num_bytes)}{files}"


def export_weights(
    source: TensorSource,
    out: Path,
    *,
    format: ExportFormat = "beit3",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a model's weights, one tensor in memory at a time; `out` appears when it is whole.

    Args:
        source: the tensors.
        out: the file to write, or with `max_shard_bytes` the folder.
        format: `beit3` is what `BEiT3.from_pretrained` loads (safetensors, logical names); `unilm-dual` and
            `unilm-fusion` are state dicts of the reference (`unilm_recipes`), `timm` is its vision tower (safetensors).
        dtype: of floating tensors; None keeps what the source has.
        max_shard_bytes: bytes of tensors in a file of a sharded folder, each at least one tensor; for `beit3` only.
        overwrite: whether to replace what is at `out`.

    Raises:
        ConfigError: if `out` exists, cannot be written, or the model or the name does not fit the format.
    """
    check_free(out, overwrite)
    if format == "timm" and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: timm tells a file by its name. Let it end in .safetensors.")
    if max_shard_bytes is not None and format != "beit3":
        raise ConfigError(f"--max-shard-size: {format} is one file, because that is what its readers load. Drop it.")
    recipes = _recipes(source, format)
    if dtype is not None:
        recipes = [recipe.cast(dtype) for recipe in recipes]
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    metadata = _metadata(source, format)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        num_bytes = sum(recipe.num_bytes for recipe in recipes)
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=f"writing {out.name}", disable=None) as bar:
            recipes = [_counted(recipe, bar) for recipe in recipes]
            if max_shard_bytes is not None:
                _write_shards(aside, recipes, max_shard_bytes, metadata)
            elif format in ("beit3", "timm"):
                _write_safetensors(aside, recipes, metadata)
            else:
                write_state_dict_file(aside, recipes, metadata)
        _put(aside, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}. Free space there, or name another place.") from error
    finally:
        _remove(aside)
    files = [file for file in out.iterdir() if file.name != INDEX_NAME] if out.is_dir() else [out]
    return Exported(len(recipes), sum(file.stat().st_size for file in files), len(files))


def loading_hint(config: ModelConfig, out: Path, format: ExportFormat) -> str:
    """How to load what was exported, and for what it is exact."""
    if format == "beit3":
        return f"Workload it with BEiT3.from_pretrained({str(out)!r})."
    if format == "timm":
        return (
            "Workload it with timm; fc_norm is the model's final norm, which forward_features does not apply:\n"
            f"{timm_recipe_lines(config, str(out))}\n"
            "They are BEiT3.encode(images=images).images of the model; model(images) is fc_norm of the patches' mean."
        )
    hint = f"Build the reference with torchscale's EncoderConfig({_call_arguments(reference_arguments(config))})."
    if not config.sub_layernorm:
        hint += "\nThe model has no sub-LN, which unilm's own configurations have: subln=False is needed."
    if config.num_vision_language_layers and format == "unilm-dual":
        hint += "\nIt is exact for images and for texts; for pairs use --format unilm-fusion."
    elif config.num_vision_language_layers:
        hint += "\nIt is exact for pairs; for images and for texts use --format unilm-dual."
    return hint


def check_free(out: Path, overwrite: bool) -> None:
    """Refuses a place that is taken; a folder is overwritten only if it holds exported weights.

    Raises:
        ConfigError: if it is.
    """
    if out.is_dir():
        foreign = next((file.name for file in sorted(out.iterdir()) if not _is_own_file(file)), None)
        if foreign is not None or not (out / INDEX_NAME).is_file():
            held = f" and holds {foreign}" if foreign else ""
            raise ConfigError(
                f"{out} is a folder, but not one of exported weights alone{held}. Name a file in it, or another folder."
            )
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists already. Name another place, or replace it with --force.")


def _is_own_file(file: Path) -> bool:
    """Returns whether a file of a folder is one that an export writes."""
    if file.is_symlink() or not file.is_file():
        return False
    return file.name == INDEX_NAME or (_SHARD_NAME.fullmatch(file.name) is not None and is_pretrained_file(file))


def parse_byte_count(text: str) -> int:
    """Reads a size such as `5GB` (10^9 bytes each), `500MB`, `2GiB` (2^30) or `1000000`.

    Raises:
        ConfigError: if it is none, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    count = 0
    if match:
        count = round(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if count < 1:
        raise ConfigError(f"{text!r} is no size in bytes. Write it as 5GB, 500MB or 2GiB.")
    return count


def format_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000: 2.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _call_arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _metadata(source: TensorSource, format: ExportFormat) -> dict[str, str]:
    """Returns the metadata that this program needs to read the file back."""
    if format == "beit3":
        return weights_metadata(source.model, source.step)
    has_extras = any(name.startswith(EXTRA_PREFIX) for name in source.names())
    return {NOTE_KEY: ExportNote(format, source.model, source.step, has_extras).to_json()}


def _recipes(source: TensorSource, format: ExportFormat) -> list[Recipe]:
    if format == "beit3":
        return [copy_recipe(source, name) for name in source.names()]
    return timm_recipes(source) if format == "timm" else unilm_recipes(source, fusion=format == "unilm-fusion")


def _counted(recipe: Recipe, bar: tqdm) -> Recipe:
    def make() -> Tensor:
        bar.update(recipe.num_bytes)
        return recipe.make()

    return recipe._replace(make=make)


def _write_safetensors(path: Path, recipes: Sequence[Recipe], metadata: dict[str, str]) -> None:
    make = {recipe.name: recipe.make for recipe in recipes}
    entries = [TensorEntry(recipe.name, recipe.dtype, recipe.shape) for recipe in recipes]
    write_tensor_file(path, entries, lambda name: make[name](), metadata, with_digest=False)


def _write_shards(folder: Path, recipes: Sequence[Recipe], max_bytes: int, metadata: dict[str, str]) -> None:
    """Hugging Face's convention: numbered files, and an index that says which tensor is where."""
    shards: list[list[Recipe]] = [[]]
    for recipe in recipes:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + recipe.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(recipe)
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, metadata)
        weight_map |= {recipe.name: name for recipe in shard}
    total = sum(recipe.num_bytes for recipe in recipes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / INDEX_NAME, json.dumps(index, indent=1).encode())
    sync_folder(folder)


def _put(aside: Path, out: Path) -> None:
    """Gives what was written its name; a folder that has it steps aside first, as renaming cannot replace it."""
    old = aside.with_name(f"{aside.name}.old")
    if out.is_dir() or (out.exists() and aside.is_dir()):
        rename(out, old)
    rename(aside, out)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

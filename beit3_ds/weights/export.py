"""Exports weights to this project's format, to the format of BEiT-3's reference code (unilm), or to timm's format."""

import contextlib
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from beit3_ds.atomic_file import bounded_name
from beit3_ds.checkpoint.disk import rename, sync_folder, write_whole
from beit3_ds.checkpoint.index import INDEX_NAME as CHECKPOINT_INDEX_NAME
from beit3_ds.checkpoint.tensor_file import TensorEntry, write_tensor_file
from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.model.pretrained import EXTRA_PREFIX, INDEX_NAME, is_pretrained_file, weights_metadata
from beit3_ds.safetensors_header import check_safetensors
from beit3_ds.weights.export_note import NOTE_KEY, ExportNote
from beit3_ds.weights.planned_tensor import PlannedTensor, plan_copy
from beit3_ds.weights.reader import WeightReader
from beit3_ds.weights.state_dict_file import write_state_dict_file
from beit3_ds.weights.timm_export import plan_timm_export, timm_example
from beit3_ds.weights.unilm_export import plan_unilm_export
from beit3_ds.weights.unilm_names import reference_arguments
from beit3_ds.writer_lock import WriterLock

ExportFormat = Literal["beit3", "unilm-dual", "unilm-fusion", "timm"]

_OWN_METADATA = frozenset({"beit3_ds", NOTE_KEY})  # first parts of keys; visual tokenizers have beit3_ds.*
_SHARD_NAME = re.compile(r"model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


class Exported(NamedTuple):
    """Sizes of a finished export."""

    num_tensors: int
    num_bytes: int
    """Total size of all files, in bytes."""
    num_files: int
    """Number of files; does not count the index of a sharded export."""

    def describe(self) -> str:
        """Describes the sizes of the export in words."""
        files = "" if self.num_files == 1 else f" in {self.num_files} files"
        return f"{self.num_tensors} tensors, {format_bytes(self.num_bytes)}{files}"


def export_weights(
    reader: WeightReader,
    out: Path,
    *,
    format: ExportFormat = "beit3",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a model's weights to `out`; holds at most one tensor in memory, and usually only a block of 1 MiB.

    Files are written under a temporary name and then renamed to `out`.

    Args:
        reader: reader of the tensors.
        out: path of the file; with `max_shard_bytes`, path of the folder.
        format: `beit3` is this project's format, for `BEiT3.from_pretrained` (safetensors). `unilm-dual` and
            `unilm-fusion` are state dicts for unilm's code (`plan_unilm_export`). `timm` is a vision tower of timm
            (safetensors).
        dtype: dtype of the exported floating-point tensors; None keeps the stored dtypes.
        max_shard_bytes: maximum bytes of tensors per file of a sharded folder, for `beit3` only; None writes one file.
            A larger tensor gets a file of its own.
        overwrite: whether to replace existing weights at `out`.

    Raises:
        ConfigError: if `out` exists or cannot be written, or the model or the name of `out` does not suit the format.
    """
    check_free(out, overwrite)
    if format == "timm" and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: timm tells a file's type by its name. Use a name that ends in .safetensors.")
    if max_shard_bytes is not None and format != "beit3":
        raise ConfigError(f"--max-shard-size: readers of {format} load a single file. Leave out the option.")
    planned = _plan(reader, format)
    if dtype is not None:
        planned = [tensor.cast(dtype) for tensor in planned]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    with lock_output(out):
        check_free(out, overwrite)  # checked again: another export may have written the file since
        _write_planned(planned, out, format, max_shard_bytes, _metadata(reader, format))
    files = [file for file in out.iterdir() if file.name != INDEX_NAME] if out.is_dir() else [out]
    return Exported(len(planned), sum(file.stat().st_size for file in files), len(files))


def lock_output(out: Path) -> WriterLock:
    """Returns a lock that prevents other exports and imports from writing to `out`; the parent folder must exist."""
    return WriterLock(out.with_name(f".{bounded_name(out.name)}.lock"), str(out), "name another place")


def _write_planned(
    planned: Sequence[PlannedTensor],
    out: Path,
    format: ExportFormat,
    max_shard_bytes: int | None,
    metadata: dict[str, str],
) -> None:
    """Writes tensors under a temporary name, and renames the file or folder to `out`.

    Raises:
        ConfigError: if the file or folder cannot be written.
    """
    temporary = out.with_name(f".{bounded_name(out.name)}.{socket.gethostname()}.{os.getpid()}")
    try:
        num_bytes = sum(tensor.num_bytes for tensor in planned)
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=f"writing {out.name}", disable=None) as bar:
            planned = [_counted(tensor, bar) for tensor in planned]
            if max_shard_bytes is not None:
                _write_shards(temporary, planned, max_shard_bytes, metadata)
            elif format in ("beit3", "timm"):
                _write_safetensors(temporary, planned, metadata)
            else:
                write_state_dict_file(temporary, planned, metadata)
        _move_into_place(temporary, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        _remove(temporary)


def _unwritable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{out} cannot be written: {error}. Free space there, or name another place.")


def loading_hint(config: ModelConfig, out: Path, format: ExportFormat) -> str:
    """Returns instructions for loading exported weights.

    If the loaded model is exact only for some inputs, the text names these inputs.
    """
    if format == "beit3":
        return f"Load it with BEiT3.from_pretrained({str(out)!r})."
    if format == "timm":
        return (
            "Load it with timm; fc_norm is the model's final norm, which forward_features does not apply:\n"
            f"{timm_example(config, str(out))}\n"
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
    """Checks that nothing exists at an output path; with `overwrite`, exported weights may exist there.

    Raises:
        ConfigError: if the path is inside a checkpoint, contains other files, or exists and `overwrite` is false.
    """
    if (out.parent / CHECKPOINT_INDEX_NAME).is_file():
        raise ConfigError(f"{out} is inside a checkpoint, which would be damaged. Name another place.")
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink():
        foreign = next((file.name for file in sorted(out.iterdir()) if not _is_own_file(file)), None)
        if foreign is not None or not (out / INDEX_NAME).is_file():
            held = f" and holds {foreign}" if foreign else ""
            raise ConfigError(
                f"{out} is a folder, but not one of exported weights alone{held}. Name a file in it, or another folder."
            )
    elif not is_own_export(out):
        raise ConfigError(
            f"{out} exists already, and no export or import of this program wrote it, so --force would not replace it. "
            "Name another place, or delete it first."
        )
    if not overwrite:
        raise ConfigError(f"{out} exists already. Name another place, or replace it with --force.")


def is_own_export(file: Path) -> bool:
    """Returns whether a regular file was written by an export or import of this program, according to its metadata."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        if zipfile.is_zipfile(file):
            return _holds_note(file)
        return any(key.partition(".")[0] in _OWN_METADATA for key in check_safetensors(file).metadata)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _holds_note(file: Path) -> bool:
    """Returns whether a torch file contains `NOTE_KEY`, by searching the pickled bytes without unpickling them."""
    with zipfile.ZipFile(file) as archive:
        return any(
            member.filename.endswith("/data.pkl")
            and member.compress_type == zipfile.ZIP_STORED
            and NOTE_KEY.encode() in archive.read(member)
            for member in archive.infolist()
        )


def _is_own_file(file: Path) -> bool:
    """Returns whether a file is the index or a shard of exported weights."""
    if file.is_symlink() or not file.is_file():
        return False
    return file.name == INDEX_NAME or (_SHARD_NAME.fullmatch(file.name) is not None and is_pretrained_file(file))


def parse_byte_count(text: str) -> int:
    """Parses a size such as `5GB` (5 * 10^9 bytes), `500MB`, `2GiB` (2 * 2^30 bytes) or `1000000`.

    Raises:
        ConfigError: if the text is not a size, or the size is 0.
    """
    match = _SIZE.fullmatch(text.strip())
    count = 0
    if match:
        count = round(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if count < 1:
        raise ConfigError(f"{text!r} is not a size in bytes. Write it as 5GB, 500MB or 2GiB.")
    return count


def format_bytes(count: float) -> str:
    """Formats a number of bytes in decimal units, such as 2.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _call_arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _metadata(reader: WeightReader, format: ExportFormat) -> dict[str, str]:
    """Returns the metadata to store in the file, such as the model's configuration."""
    if format == "beit3":
        return weights_metadata(reader.model, reader.step, reader.task)
    task = None if reader.task is None else dict(reader.task)
    has_extras = any(name.startswith(EXTRA_PREFIX) for name in reader.names())
    return {NOTE_KEY: ExportNote(format, reader.model, reader.step, has_extras, task).to_json()}


def _plan(reader: WeightReader, format: ExportFormat) -> list[PlannedTensor]:
    if format == "beit3":
        return [plan_copy(reader, name) for name in reader.names()]
    if reader.model.dense is not None:
        raise ConfigError(
            f"{format}: the weights have model.dense, so they have no CLS token, which this format needs. Export them "
            'with the format "beit3".'
        )
    return plan_timm_export(reader) if format == "timm" else plan_unilm_export(reader, fusion=format == "unilm-fusion")


def _counted(tensor: PlannedTensor, bar: tqdm) -> PlannedTensor:
    def blocks() -> Iterator[Tensor]:
        for block in tensor.blocks():
            bar.update(block.nbytes)
            yield block

    return tensor._replace(blocks=blocks)


def _write_safetensors(path: Path, planned: Sequence[PlannedTensor], metadata: dict[str, str]) -> None:
    blocks = {tensor.name: tensor.blocks for tensor in planned}
    entries = [TensorEntry(tensor.name, tensor.dtype, tensor.shape) for tensor in planned]
    write_tensor_file(path, entries, lambda name: blocks[name](), metadata, with_digest=False)


def _write_shards(folder: Path, planned: Sequence[PlannedTensor], max_bytes: int, metadata: dict[str, str]) -> None:
    """Writes shards in Hugging Face's form: numbered files, and an index that maps each tensor to its file."""
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + tensor.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, metadata)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in planned)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / INDEX_NAME, json.dumps(index, indent=1).encode())
    sync_folder(folder)


def _move_into_place(temporary: Path, out: Path) -> None:
    """Renames the finished file or folder to `out`; replaces an old export there."""
    old = temporary.with_name(f"{temporary.name}.old")
    if out.is_dir() or (out.exists() and temporary.is_dir()):
        rename(out, old)
    rename(temporary, out)
    if not old.is_dir():
        old.unlink(missing_ok=True)
        return
    for file in filter(_is_own_file, list(old.iterdir())):
        file.unlink()
    with contextlib.suppress(OSError):  # somebody has written another file there since it was checked
        old.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

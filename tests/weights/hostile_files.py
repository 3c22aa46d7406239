"""Generates hostile checkpoints and weight files: valid ones in which one part is replaced by something invalid.

Each file depends only on its number, so a failure can be repeated.
"""

import copy
import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from beit3_ds.checkpoint.index import FORMAT, INDEX_NAME, PIECES, PIECES_FILE, VERSION, tensor_key
from beit3_ds.checkpoint.pieces import Piece, PieceTable, write_pieces
from beit3_ds.checkpoint.slices import whole_slice
from beit3_ds.checkpoint.tensor_file import TensorEntry, write_tensor_file
from beit3_ds.model.pretrained import INDEX_NAME as SHARD_INDEX_NAME
from beit3_ds.weights.export import export_weights
from tests.batches import small_model_config
from tests.hostile.values import ESCAPES, change_header, change_json, replace_file
from tests.weights.models import ModelReader, random_model


class Originals:
    """Holds one valid example of every kind of file, as the source of hostile copies."""

    def __init__(self, folder: Path) -> None:
        reader = ModelReader(random_model(small_model_config()))
        export_weights(reader, folder / "weights.safetensors")
        export_weights(reader, folder / "released.pth", format="unilm-dual")
        export_weights(reader, folder / "timm.safetensors", format="timm")
        export_weights(reader, folder / "shards", max_shard_bytes=30_000)
        self.folder, self.checkpoint = folder, folder / "step-00000003"
        self.checkpoint.mkdir()
        shapes = {name: reader.shape(name) for name in reader.names()}
        entries = [
            TensorEntry(tensor_key("weight", name, part), torch.float32, part.shape)
            for name, shape in shapes.items()
            for part in [whole_slice(shape)]
        ]
        written = write_tensor_file(
            self.checkpoint / "weights-00000.safetensors",
            entries,
            lambda key: [reader.read(key.split()[0])],
            {},
        )
        pieces = PieceTable.build((name, Piece(0, whole_slice(shape))) for name, shape in shapes.items())
        self.index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "step": 3,
            "optimizer_step": 3,
            "model": json.loads(json.dumps(dataclasses.asdict(reader.model))),
            "config": {"task": {"name": "pretraining"}, "training": {"seed": 1}},
            "tokenizers": {},
            "layout": "1 data-parallel x 1 tensor-parallel ranks",
            "versions": {"torch": "2"},
            "data": {},
            "files": {
                "weights-00000.safetensors": list(written),
                PIECES_FILE: list(write_pieces(self.checkpoint, pieces)),
            },
            "tensors": {name: {"shape": list(shapes[name]), "pieces": 1} for name in sorted(shapes)},
            "buffers": {},
        }
        self.old_index = copy.deepcopy(self.index) | {"version": 1}
        """The index in format 1, which contains the pieces."""
        for name, tensor in self.old_index["tensors"].items():
            tensor["pieces"] = [[0, *whole_slice(shapes[name])]]
        write_index(self.checkpoint, self.index)


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Writes an index with a valid digest, so that its content is read."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()
    (folder / INDEX_NAME).write_text(json.dumps({**plain, "sha256": content.get("sha256", digest)}))


def write_hostile(originals: Originals, folder: Path, number: int) -> Path:
    """Writes the hostile file with the given number into an empty folder; returns the path for `beit3 inspect`."""
    draw = random.Random(number)
    kinds: list[Callable[[Originals, Path, random.Random], Path]] = [
        *(_changed_index, _changed_index, _strange_index, _strange_piece_file),
        *(_changed_header, _changed_header, _strange_bytes, _strange_shards, _changed_torch),
    ]
    return kinds[number % len(kinds)](originals, folder, draw)


def _changed_index(originals: Originals, folder: Path, draw: random.Random) -> Path:
    path = _copy_checkpoint(originals, folder)
    content = copy.deepcopy(draw.choice([originals.index, originals.old_index]))
    change_json(content, draw)
    write_index(path, content)
    return path


def _strange_index(originals: Originals, folder: Path, draw: random.Random) -> Path:
    path = _copy_checkpoint(originals, folder)
    replace_file(path / INDEX_NAME, draw)
    return path


def _strange_piece_file(originals: Originals, folder: Path, draw: random.Random) -> Path:
    path, content = _copy_checkpoint(originals, folder), copy.deepcopy(originals.index)
    file = path / draw.choice(["weights-00000.safetensors", PIECES_FILE])
    names = ["/dev/zero", "../../etc/passwd", "weights-00001.safetensors", ".", "", ESCAPES, "/dev/stdin"]
    match draw.randrange(5):
        case 0:
            content["files"][draw.choice(names)] = [0, "0" * 64]
        case 1:
            content = copy.deepcopy(originals.old_index)
            tensor = next(tensor for tensor in content["tensors"].values() if len(tensor["shape"]) == 2)
            tensor["pieces"] = [[0, 0, 1, 0, 1]] * 30_000
        case 2:
            replace_file(file, draw)
        case 3:
            change_header(file, draw)
            _forge(file, content)
        case _:
            _change_table(path / PIECES_FILE, content, draw)
    write_index(path, content)
    return path


def _change_table(file: Path, content: dict[str, Any], draw: random.Random) -> None:
    """Replaces the table of pieces by an invalid one with a valid digest."""
    rows = load_file(file)[PIECES]
    match draw.randrange(4):
        case 0:
            row, column = draw.randrange(len(rows)), draw.randrange(1, 5)
            rows[row, column] = draw.choice([-1, -(2**63), 2**63 - 1, 2**62, 10**6, int(rows[row, column]) + 1])
        case 1:
            rows = draw.choice([rows.float(), rows.int(), rows[1:], rows.T, rows.view(-1), torch.zeros(0, 5).long()])
        case 2:
            rows[:, 0] = draw.choice([-1, 10**6, 2**63 - 1])
        case _:
            tensor = draw.choice(list(content["tensors"].values()))
            tensor["pieces"] = draw.choice([0, 2, 2**62, 30_000])
            rows = rows[:1].repeat(draw.choice([1, len(rows), len(rows) + 30_000]), 1)
    save_file({draw.choice([PIECES, PIECES, PIECES, "rows"]): rows.contiguous()}, file)
    _forge(file, content)


def _forge(file: Path, content: dict[str, Any]) -> None:
    """Updates size and digest in the index for a changed file."""
    content["files"][file.name] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]


def _changed_header(originals: Originals, folder: Path, draw: random.Random) -> Path:
    name = draw.choice(["weights.safetensors", "timm.safetensors"])
    path = Path(shutil.copy(originals.folder / name, folder / name))
    change_header(path, draw)
    return path


def _strange_bytes(originals: Originals, folder: Path, draw: random.Random) -> Path:
    name = draw.choice(["weights.safetensors", "timm.safetensors", "released.pth"])
    path = Path(shutil.copy(originals.folder / name, folder / name))
    replace_file(path, draw)
    return path


def _strange_shards(originals: Originals, folder: Path, draw: random.Random) -> Path:
    path = folder / "shards"
    shutil.copytree(originals.folder / "shards", path)
    index = path / SHARD_INDEX_NAME
    if draw.random() < 0.3:
        replace_file(index, draw)
        return path
    content = json.loads(index.read_text())
    if draw.random() < 0.5:
        name = draw.choice(list(content["weight_map"]))
        content["weight_map"][name] = draw.choice(["/dev/zero", "../../../etc/passwd", ESCAPES, "..", "", 3, None, []])
    else:
        change_json(content["weight_map"], draw)
    index.write_text(json.dumps(content))
    return path


def _changed_torch(originals: Originals, folder: Path, draw: random.Random) -> Path:
    path = folder / "released.pth"
    data = bytearray((originals.folder / "released.pth").read_bytes())
    match draw.randrange(3):
        case 0:
            del data[draw.randrange(len(data)) :]
        case 1:
            for _ in range(draw.randrange(1, 50)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            data[:4] = draw.randbytes(4)
        case _:
            data = bytearray(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R." + draw.randbytes(20))
    path.write_bytes(data)
    return path


def _copy_checkpoint(originals: Originals, folder: Path) -> Path:
    return Path(shutil.copytree(originals.checkpoint, folder / originals.checkpoint.name))

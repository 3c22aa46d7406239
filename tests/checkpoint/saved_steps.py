"""Finds and edits the files of checkpoints that the fixture `root` has saved."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit3_ds.checkpoint.index import INDEX_NAME, PIECES_FILE

FILES = (
    *("weights-00000.safetensors", "moments-00000.safetensors", "buffers-00000.safetensors"),
    *(PIECES_FILE, INDEX_NAME),
)
BEFORE, NEWEST = 5, 6


def folder(root: Path, step: int = NEWEST) -> Path:
    return root / f"step-{step:08d}"


def edit_index(root: Path, edit: Callable[[dict[str, Any]], Any], with_digest: bool) -> None:
    path = folder(root) / INDEX_NAME
    content = json.loads(path.read_text())
    digest = content.pop("sha256")
    edit(content)
    if with_digest:
        digest = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}, separators=(",", ":")))

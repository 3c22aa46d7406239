"""Files of torch with one state dict, written tensor after tensor."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from beit3_ds.weights.recipe import Recipe

_ALIGNMENT = 64  # bytes, as torch aligns its own tensors


def write_state_dict_file(path: Path, recipes: Sequence[Recipe], notes: Mapping[str, str]) -> None:
    """Writes {"model": state dict, **notes} as a new file that `torch.load(weights_only=True)` reads, and syncs it.

    torch.save takes all tensors at once. They are first written to an unnamed temporary file beside `path`, which is
    mapped. So memory holds one tensor at a time, and the disk holds the file twice for a while.

    Raises:
        FileExistsError: if there is one already.
        OSError: if the disk is full or cannot be written.
    """
    offsets, end = [], 0
    for recipe in recipes:
        offsets.append(end)
        end += recipe.num_bytes + -recipe.num_bytes % _ALIGNMENT
    with open(path, "xb") as file, tempfile.TemporaryFile(dir=path.parent) as data:
        os.posix_fallocate(data.fileno(), 0, end)  # a full disk is an error here; in the mapping it would be a SIGBUS
        mapped = np.memmap(data, np.uint8, mode="r+")
        state = {}
        for recipe, offset in zip(recipes, offsets, strict=True):
            # A storage of its own for every tensor: torch.save writes whole storages.
            flat = torch.from_numpy(mapped[offset : offset + recipe.num_bytes])
            state[recipe.name] = flat.view(recipe.dtype).view(recipe.shape)
            state[recipe.name].copy_(recipe.make())
        torch.save({"model": state, **notes}, file)
        file.flush()
        os.fsync(file.fileno())

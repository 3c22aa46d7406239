"""Writes a torch file with a state dict, one tensor at a time."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from beit3_ds.weights.planned_tensor import PlannedTensor

_ALIGNMENT = 64  # bytes, as torch aligns its own tensors


def write_state_dict_file(path: Path, planned: Sequence[PlannedTensor], notes: Mapping[str, str]) -> None:
    """Writes {"model": state dict, **notes} to a new file that `torch.load(weights_only=True)` reads; syncs the file.

    torch.save needs all tensors at once, so it gets them from a memory-mapped temporary file next to `path`. Memory
    holds one tensor at a time, but the disk briefly holds all tensors twice.

    Raises:
        FileExistsError: if the file exists.
        OSError: if the disk is full or cannot be written.
    """
    offsets, end = [], 0
    for tensor in planned:
        offsets.append(end)
        end += tensor.num_bytes + -tensor.num_bytes % _ALIGNMENT
    with open(path, "xb") as file, tempfile.TemporaryFile(dir=path.parent) as data:
        os.posix_fallocate(data.fileno(), 0, end)  # a full disk is an error here; in the mapping it would be a SIGBUS
        mapped = np.memmap(data, np.uint8, mode="r+")
        state = {}
        for tensor, offset in zip(planned, offsets, strict=True):
            # A storage of its own for every tensor: torch.save writes whole storages.
            flat = torch.from_numpy(mapped[offset : offset + tensor.num_bytes])
            state[tensor.name] = flat.view(tensor.dtype).view(tensor.shape)
            state[tensor.name].copy_(tensor.build())
        torch.save({"model": state, **notes}, file)
        file.flush()
        os.fsync(file.fileno())

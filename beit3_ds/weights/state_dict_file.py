"""Writes a state dict to a torch file without holding all tensors in memory."""

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

    torch.save needs all tensors at once. They are therefore first copied into a memory-mapped temporary file next to
    `path`. Memory holds one block of a tensor at a time, but the disk briefly holds all tensors twice.

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
            # Every tensor gets a storage of its own, because torch.save writes whole storages.
            flat = torch.from_numpy(mapped[offset : offset + tensor.num_bytes])
            elements, position = flat.view(tensor.dtype), 0
            for block in tensor.blocks():
                elements[position : position + block.numel()] = block.flatten()
                position += block.numel()
            assert position == elements.numel(), f"{tensor.name} has {position} elements, not {elements.numel()}"
            state[tensor.name] = elements.view(tensor.shape)
        torch.save({"model": state, **notes}, file)
        file.flush()
        os.fsync(file.fileno())

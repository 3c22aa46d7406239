"""One checkpoint on disk, read by any rank of any layout."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.checkpoint.index import FILE_KINDS, BrokenIndexError, file_name, read_index, tensor_key
from beit3_ds.checkpoint.rectangles import Rectangle, whole
from beit3_ds.checkpoint.tensor_file import BrokenTensorFileError, TensorEntry, TensorFile
from beit3_ds.config import ModelConfig

_FILE_OF_KIND = {kind: file for file, kinds in FILE_KINDS.items() for kind in kinds}


class CheckpointFolder:
    """A whole checkpoint: its index was read, and its files are there with the right sizes.

    Digests are compared by `find_damage`, because that reads everything; other reading costs what is asked for.
    """

    def __init__(self, path: Path) -> None:
        """Reads the index.

        Raises:
            BrokenIndexError: if the checkpoint is torn or changed, in a few words.
        """
        self.path, self.index = path, read_index(path)
        for name, written in self.index.files.items():
            try:
                size = (path / name).stat().st_size
            except OSError:
                raise BrokenIndexError(f"{name} is missing") from None
            if size != written.num_bytes:
                raise BrokenIndexError(f"{name} has {size} bytes instead of {written.num_bytes}")
        self._opened: dict[str, TensorFile] = {}

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        return ModelConfig(**self.index.run.model)

    @property
    def step(self) -> int:
        """Updates done."""
        return self.index.step

    def find_damage(self, names: Iterable[str], report: Callable[[int], None] = lambda num_bytes: None) -> str | None:
        """Compares files with their digests; returns the first difference in a few words, or None.

        Args:
            names: of files, as in `index.files`.
            report: called with the bytes read after every file.
        """
        for name in names:
            try:
                digest = file_sha256(self.path / name)
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
            if digest != self.index.files[name].sha256:
                return f"{name} was changed: its digest is another"
            report(self.index.files[name].num_bytes)
        return None

    def names(self) -> list[str]:
        """Logical names of all tensors."""
        return list(self.index.shapes)

    def shape(self, name: str) -> torch.Size:
        """Logical shape of a tensor."""
        return self.index.shapes[name]

    def read(self, name: str, part: Rectangle | None = None) -> Tensor:
        """A tensor's float32 weights, in its logical shape, or a part of it as a matrix."""
        values = self.read_kind("weight", name, part or whole(self.shape(name)))
        return values if part else values.view(self.shape(name))

    def read_kind(self, kind: str, name: str, part: Rectangle) -> Tensor:
        """A part of a tensor's weights or moments as a matrix, float32.

        Args:
            kind: "weight", "exp_avg" or "exp_avg_sq".
            name: of the tensor.
            part: of the tensor seen as a matrix.
        """
        values = torch.empty(part.shape)
        for rank, rectangle in self.index.pieces[name]:
            if common := part.intersection(rectangle):
                file = self._open(file_name(_FILE_OF_KIND[kind], rank))
                rows, columns = common.inside(rectangle)
                key = tensor_key(kind, name, rectangle)
                if file.entries.get(key) != TensorEntry(key, torch.float32, rectangle.shape):
                    raise BrokenTensorFileError(f"{file.path} has no {key} in float32")
                piece = file.read_rows(key, rows.start, rows.stop)
                values[common.inside(part)] = piece[:, columns]
        return values

    def close(self) -> None:
        """Closes the files."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def _open(self, name: str) -> TensorFile:
        if name not in self._opened:
            try:
                self._opened[name] = TensorFile(self.path / name)
            except (BrokenTensorFileError, OSError) as error:
                raise BrokenIndexError(f"{name} cannot be read: {error}") from None
        return self._opened[name]

"""Reads Fashion-MNIST from the files of Debian's package."""

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Names of the classes, in the order of labels."""

Bytes = npt.NDArray[np.uint8]


def fashion_mnist(split: str, count: int) -> tuple[Bytes, Bytes]:
    """Returns the first images of a split, light on black, (count, 28, 28), and their labels, (count,).

    Skips the test if the package is not installed. The splits are "train" and "t10k".
    """
    if not FOLDER.is_dir():
        pytest.skip(f"needs Debian's package dataset-fashion-mnist in {FOLDER}")
    with gzip.open(FOLDER / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read()[16:], np.uint8)[: count * 784].reshape(count, 28, 28)
    with gzip.open(FOLDER / f"{split}-labels-idx1-ubyte.gz") as file:
        return pixels, np.frombuffer(file.read()[8:], np.uint8)[:count]

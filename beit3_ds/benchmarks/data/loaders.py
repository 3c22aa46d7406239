"""Compares this project's data loader with WebDataset and torchvision's ImageFolder on the same JPEGs.

Speed is in images per CPU second. Each loader has one process with one thread. All loaders decode with Pillow, jitter
the colours, flip and crop, make two views of the crop, and draw a block mask. For colours, flips, crops and views,
WebDataset and ImageFolder use torchvision's transforms, as users of BEiT do. This project's `block_mask` draws the
masks of all loaders.
"""

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3_ds.benchmarks.medians import median_with_interval
from beit3_ds.config import ConfigError
from beit3_ds.data.images.augmentation import Augmentation
from beit3_ds.data.images.decoding import decode_image
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.order.stream import order_from_start
from beit3_ds.data.samples import SampleKey
from beit3_ds.pixels import to_floats
from beit3_ds.tasks.pretraining.masking import block_mask
from beit3_ds.tasks.pretraining.packing import ImageShape, pack
from beit3_ds.tasks.pretraining.samples import ImageSamples
from beit3_ds.tasks.pretraining.targets import TOKENIZER_PIXELS

_WIDTH, _HEIGHT, _QUALITY, _NUM_IMAGES = 500, 400, 90, 64
_BATCH, _IMAGE_SIZE, _GRID, _NUM_MASKED, _MIN_SCALE, _JITTER = 32, 224, 14, 78, 0.2, 0.4
_ROUNDS = 11
_RATIOS = {"ratio_webdataset": "webdataset", "ratio_torchvision": "torchvision", "decode_limit_share": "decode alone"}

Batches = Iterator[Any]
"""Endless iterator, which prepares a batch of `_BATCH` images in each step."""


def benchmark_data(json_path: str | None = None) -> str:
    """Measures all data loaders in turn, and returns a table. Also writes the results as JSON to `json_path`.

    A ratio divides the speed of this project's loader by the speed of another loader, or of decoding alone, in the same
    round. For each speed and each ratio, the table has the median of all rounds, with a 95% confidence interval.

    Raises:
        ConfigError: if the package webdataset is not installed, or `json_path` cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        jpegs = _write_images(Path(folder))
        contestants = {
            "beit3_ds": _ours(folder),
            "webdataset": _webdataset(folder),
            "torchvision": _image_folder(folder),
            "decode alone": _decode(jpegs),
        }
        rates = _measure_in_turn(contestants)
    sizes = [len(jpeg) for jpeg in jpegs]
    result = _result(rates, statistics.mean(sizes) / 1000)
    if json_path is not None:
        try:
            Path(json_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--json {json_path}: cannot be written ({error}). Name a file in an existing folder."
            ) from None
    return _table(result)


def _write_images(folder: Path) -> list[bytes]:
    """Writes random JPEGs twice, as a tar and as a folder with one class; returns the JPEGs."""
    (folder / "class").mkdir()
    jpegs = [_photo(np.random.default_rng(i)) for i in range(_NUM_IMAGES)]
    with tarfile.open(folder / "images.tar", "w") as archive:
        for i, jpeg in enumerate(jpegs):
            info = tarfile.TarInfo(f"{i:04d}.jpg")
            info.size = len(jpeg)
            archive.addfile(info, io.BytesIO(jpeg))
            (folder / "class" / info.name).write_bytes(jpeg)
    return jpegs


def _photo(rng: np.random.Generator) -> bytes:
    """Returns a JPEG of random noise with the size of a photo; fine structures have less contrast than coarse ones."""
    pixels = np.full((_HEIGHT, _WIDTH, 3), 128.0)
    for columns, contrast in ((4, 60), (16, 35), (64, 18), (200, 8)):
        noise = rng.normal(128, contrast, (columns * 4 // 5, columns, 3)).clip(0, 255).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)) - 128.0
    pixels += rng.normal(0, 4, (_HEIGHT, _WIDTH, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=_QUALITY)
    return buffer.getvalue()


def _ours(folder: str) -> Batches:
    """Yields batches of images, which this project prepares as in a training run."""
    augmentation = Augmentation(
        image_size=_IMAGE_SIZE,
        tokenizer_image_size=_IMAGE_SIZE,
        min_crop_scale=_MIN_SCALE,
        color_jitter=_JITTER,
        flip_probability=0.5,
    )
    shards = TarShards([os.path.join(folder, "images.tar")])
    samples = ImageSamples(source=shards, views=augmentation, grid_size=_GRID, num_masked=_NUM_MASKED)
    order = order_from_start(0, "images", [len(samples)])
    shape = ImageShape(_IMAGE_SIZE, _IMAGE_SIZE, _GRID**2)
    step = 0
    while True:
        epochs, indices = order(np.arange(step * _BATCH, (step + 1) * _BATCH))
        keys = [SampleKey(0, "images", e, i) for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)]
        batch = pack([samples.prepare(key.index, key) for key in keys], None, {}, shape)
        assert batch.pixels is not None, "both views are kept"
        # A training run changes colours and normalises on the device; here this counts as work of the loader.
        yield batch, [to_floats(view, batch.colors) for view in (batch.pixels, batch.targets[TOKENIZER_PIXELS])]
        step += 1


class _BeitTransform:
    """Prepares an image with torchvision's transforms, as BEiT's pretraining does."""

    def __init__(self) -> None:
        from torchvision import transforms

        mode = transforms.InterpolationMode
        self._sizes = (_IMAGE_SIZE, mode.BICUBIC), (_IMAGE_SIZE, mode.LANCZOS)
        self._common = transforms.Compose(
            [transforms.ColorJitter(_JITTER, _JITTER, _JITTER), transforms.RandomHorizontalFlip()]
        )
        normalize = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
        self._to_tensor = transforms.Compose([transforms.ToTensor(), normalize])
        self._rng = np.random.default_rng(0)

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.functional import resized_crop

        image = self._common(image)
        box = RandomResizedCrop.get_params(image, (_MIN_SCALE, 1.0), (3 / 4, 4 / 3))
        first, second = (self._to_tensor(resized_crop(image, *box, [size, size], mode)) for size, mode in self._sizes)
        return first, second, block_mask(_GRID, _NUM_MASKED, self._rng)


def _webdataset(folder: str) -> Batches:
    try:
        import webdataset
    except ImportError:
        raise ConfigError(
            "bench data: the package webdataset is not installed. Install it with `pip install webdataset`."
        ) from None
    transform = _BeitTransform()
    dataset = webdataset.WebDataset(os.path.join(folder, "images.tar"), shardshuffle=False).repeat()
    views = dataset.shuffle(_NUM_IMAGES).decode("pilrgb").map(lambda sample: transform(sample["jpg"]))
    return iter(views.batched(_BATCH))


def _image_folder(folder: str) -> Batches:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(folder, _BeitTransform())
    loader: Iterable[Any] = DataLoader(dataset, batch_size=_BATCH, shuffle=True)
    while True:
        yield from loader


def _decode(jpegs: list[bytes]) -> Batches:
    """Yields batches of images that are only decoded. The speed of this function is an upper limit for the speed of
    loaders.
    """
    while True:
        for start in range(0, len(jpegs), _BATCH):
            for jpeg in jpegs[start : start + _BATCH]:
                decode_image(jpeg)
            yield None


def _measure_in_turn(contestants: dict[str, Batches]) -> dict[str, list[float]]:
    """Returns the images per CPU second of each loader in each round. The first round only warms up and is left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(_ROUNDS + 1):
            for name, batches in contestants.items():
                start = time.process_time()
                next(batches)
                rates[name].append(_BATCH / (time.process_time() - start))
        return {name: values[1:] for name, values in rates.items()}
    finally:
        torch.set_num_threads(threads)


def _result(rates: dict[str, list[float]], kilobytes: float) -> dict[str, Any]:
    intervals = {
        name: median_with_interval([a / b for a, b in zip(rates["beit3_ds"], rates[other], strict=True)])
        for name, other in _RATIOS.items()
    }
    return {
        "image_size": _IMAGE_SIZE,
        "jpeg": f"{_WIDTH} x {_HEIGHT}, {kilobytes:.0f} kB on average",
        "rows": [{"loader": name, "images_per_second_per_core": median_with_interval(v)} for name, v in rates.items()],
        "summary": {name: interval["median"] for name, interval in intervals.items()},
        "intervals": intervals,
    }


def _table(result: dict[str, Any]) -> str:
    def show(values: dict[str, float], digits: int) -> str:
        return f"{values['median']:.{digits}f} ({values['low']:.{digits}f} to {values['high']:.{digits}f})"

    lines = [
        f"JPEG {result['jpeg']}; two views of {result['image_size']} px; batches of "
        f"{_BATCH}, {_ROUNDS} rounds in turn, median (95% interval); torch {torch.__version__}",
        "| loader | images/s per core (CPU time) |",
        "|---|---|",
    ]
    lines += [f"| {row['loader']} | {show(row['images_per_second_per_core'], 0)} |" for row in result["rows"]]
    lines += [f"{name}: {show(interval, 2)}" for name, interval in result["intervals"].items()]
    return "\n".join(lines)

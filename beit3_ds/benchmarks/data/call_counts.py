"""Counts file opens and read calls per sample for each data format and order. Also times opening many shards.

Python's audit hook counts opens, and Linux counts reads (`file_calls`). All files are in the page cache.
"""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit3_ds.benchmarks.data.file_calls import count_file_calls
from beit3_ds.config import DataConfig, SourceConfig, StreamConfig, TextTokenizerConfig
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.order.permutation import block_key, order_permutation
from beit3_ds.data.prepare.annotations import prepare_annotations
from beit3_ds.data.prepare.index import prepare_indices, shard_paths
from beit3_ds.data.prepare.texts import prepare_texts
from beit3_ds.data.sources import open_images
from beit3_ds.data.text.sequences import TextSequences
from beit3_ds.tokenizers.text import train_text_tokenizer

_SHARDS, _PER_SHARD, _WINDOW = 64, 32, 4
_FEW_OPEN = 8  # limit of open shards, to represent a corpus with more shards than a process may open
_SENTENCES = ("a red bird sits left of two green boats.", "old trees stand in the snow near the water.")


@dataclass(frozen=True, kw_only=True)
class CallCounts:
    """Holds the file calls per sample, for one data format and one order of samples."""

    source: str
    """Data format, and which part of each sample is read, for example "tar, images"."""
    order: str
    """Order of the samples, a value of `data.order`: "shuffled" or "shard_sequential"."""
    open_shards: int
    """Maximum number of shards that are open at once."""
    opens: float
    """File opens per sample."""
    reads: float
    """Read calls per sample."""
    kilobytes: float
    """Kilobytes that the read calls returned, per sample."""


def count_calls() -> list[CallCounts]:
    """Reads each data format for one epoch in each order, and counts the file calls."""
    with tempfile.TemporaryDirectory() as folder:
        data = _write_corpora(Path(folder))
        return [
            *(
                _count(f"tar, {what}", order, limit, _open_tars(data, limit), what)
                for what in ("images", "pairs")
                for limit in (_SHARDS, _FEW_OPEN)
                for order in ("shuffled", "shard_sequential")
            ),
            *(
                _count(f"{source.format}, pairs", order, _SHARDS, open_images(source, data.cache_dir), "pairs")
                for source in data.pairs.train[1:]
                for order in ("shuffled", "shard_sequential")
            ),
            *(_count_texts(data, Path(folder), order) for order in ("shuffled", "shard_sequential")),
        ]


def describe_calls(rows: Sequence[CallCounts]) -> str:
    """Formats the counts of file calls as a Markdown table."""
    lines = [
        f"Calls per sample, prepared data: {_SHARDS} shards of {_PER_SHARD} samples, one epoch, one process",
        "| format | order | shards that may stay open | opens | reads | kB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.source} | {row.order} | {row.open_shards} | {row.opens:.2f} | {row.reads:.2f} | {row.kilobytes:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def time_opening(num_shards: int) -> str:
    """Measures how long it takes to open `num_shards` small tars with an index; returns the result as a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "00000.tar"
        _write_tar(first, 0, 4)
        for number in range(1, num_shards):
            (Path(folder) / f"{number:05d}.tar").write_bytes(first.read_bytes())
        pattern, prepared = str(Path(folder) / "*.tar"), str(Path(folder) / "prepared")
        prepare_indices(TarShards([str(first)]).paths, prepared, num_processes=1)
        prepare_indices(sorted(map(str, Path(folder).glob("*.tar"))), prepared, num_processes=1)
        start = time.perf_counter()
        shards = TarShards([pattern], prepared)
        opening = time.perf_counter() - start
        return (
            f"opening {len(shards.paths):,} prepared shards: {opening:.2f} s, {opening / num_shards * 1e6:.0f} us each"
        )


def _write_corpora(folder: Path) -> DataConfig:
    """Writes the raw text of a corpus, and image-text pairs in three formats: tars, a folder, and COCO annotations.

    Also writes the tar indices and the annotation table. The raw text is tokenized later, by `_count_texts`.
    """
    (folder / "images").mkdir()
    annotations: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for shard in range(_SHARDS):
        _write_tar(folder / f"{shard:03d}.tar", shard, _PER_SHARD)
        for number in range(_PER_SHARD):
            name, key = f"{shard:03d}-{number:03d}", shard * _PER_SHARD + number
            (folder / "images" / f"{name}.jpg").write_bytes(_jpeg(key))
            (folder / "images" / f"{name}.txt").write_text(_SENTENCES[key % 2])
            annotations["images"].append({"id": key, "file_name": f"{name}.jpg"})
            annotations["annotations"].append({"id": key, "image_id": key, "caption": _SENTENCES[key % 2]})
    (folder / "coco.json").write_text(json.dumps(annotations))
    (folder / "text.txt").write_text("\n\n".join(_SENTENCES * _SHARDS * _PER_SHARD))
    sources = (
        SourceConfig(path=str(folder / "*.tar"), format="tar"),
        SourceConfig(path=str(folder / "images"), format="folder"),
        SourceConfig(path=str(folder / "coco.json"), format="coco", images=str(folder / "images")),
    )
    data = DataConfig(
        images=StreamConfig(train=(), samples_per_step=0),
        pairs=StreamConfig(train=sources, samples_per_step=1),
        texts=StreamConfig(train=(SourceConfig(path=str(folder / "text.txt")),), samples_per_step=1),
        cache_dir=str(folder / "prepared"),
        text_length=32,
    )
    prepare_indices(shard_paths(data), str(folder / "prepared"), num_processes=1)
    prepare_annotations(data)
    return data


def _write_tar(path: Path, shard: int, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            key = shard * count + number
            for extension, content in (("jpg", _jpeg(key)), ("txt", _SENTENCES[key % 2].encode())):
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _jpeg(key: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(key).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def _open_tars(data: DataConfig, limit: int) -> ImageSource:
    return TarShards([data.pairs.train[0].path], data.cache_dir, OpenFiles(limit))


def _count(source: str, order: str, limit: int, images: ImageSource, what: str) -> CallCounts:
    read: Callable[[int], object] = images.image if what == "images" else images.pair

    def read_sample(index: int) -> None:
        read(index)
        images.name(index)

    return _count_reads(source, order, limit, len(images), read_sample)


def _count_texts(data: DataConfig, folder: Path, order: str) -> CallCounts:
    config = TextTokenizerConfig(path=str(folder / "text.spm"), vocab_size=24, character_coverage=1.0)
    tokenizer = train_text_tokenizer(config, list(_SENTENCES) * 60)
    prepare_texts(data, tokenizer, processes=1)
    sequences = TextSequences([data.texts.train[0].path], tokenizer, data.text_length, data.cache_dir)
    return _count_reads("texts, prepared", order, _SHARDS, len(sequences), lambda index: sequences[index])


def _count_reads(source: str, order: str, limit: int, size: int, read_sample: Callable[[int], object]) -> CallCounts:
    key = ("bench", 0) if order == "shuffled" else ("bench", block_key(_PER_SHARD, _WINDOW), 0)
    indices = order_permutation(0, key, size)(np.arange(size)).tolist()
    with count_file_calls() as calls:
        for index in indices:
            read_sample(index)
    return CallCounts(
        source=source,
        order=order,
        open_shards=limit,
        opens=calls.opens / size,
        reads=calls.reads / size,
        kilobytes=calls.num_bytes / size / 1000,
    )

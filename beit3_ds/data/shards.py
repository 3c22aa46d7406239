"""Random access to the images and captions in WebDataset tar shards, without unpacking them."""

import os
from collections.abc import Iterable

import numpy as np
from PIL import Image

from beit3_ds.data.captions import MAX_JSON_BYTES, decode_caption, decode_json_caption
from beit3_ds.data.files import expand_patterns
from beit3_ds.data.image_source import BrokenRecord, Skipped
from beit3_ds.data.images import MAX_IMAGE_BYTES, decode_image
from beit3_ds.data.shard_index import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    NO_MEMBER,
    ShardIndex,
    StoredIndex,
    index_path,
    scan_shard,
)

_KINDS = {"image": (IMAGE_EXTENSIONS, MAX_IMAGE_BYTES), "caption": (CAPTION_EXTENSIONS, MAX_JSON_BYTES)}


class TarShards:
    """The samples of uncompressed tar files, in the order of files and of each sample's first member.

    By WebDataset's rule the members `folder/KEY.webp` and `folder/KEY.txt` are the image and the caption of the
    sample `folder/KEY`: the key ends at the first dot of the file name. Without `KEY.txt` the caption is the value of
    `caption` in `KEY.json`. Other members are left alone.

    What is found in real corpora, and what becomes of it:

    | found | rule |
    |---|---|
    | tar cut off, also between two members; damaged header; second tar appended | refused: `ConfigError` |
    | tar unlike its index in size or modification time | refused: `ConfigError` |
    | changed bytes under an old date | found by `beit3 prepare index --verify` |
    | one name twice; a second image of a sample | the first counts, the others are in `skipped` |
    | links, devices, sparse files, names with `..` or a leading `/` | never read, in `skipped` |
    | image empty, cut off, too large, no image, of unknown white | `BrokenRecord` |
    | image under another format's extension | read: the content tells |
    | grey, palette, CMYK, 16 bits, alpha, animation, EXIF rotation | upright RGB on white, first frame |
    | caption missing, empty, too long, not UTF-8, with NUL or half a surrogate pair | `BrokenRecord` |

    Opening reads the index files of `prepared_dir`, one short read each; where there is none, it reads the tar's
    headers and keeps about 50 bytes a sample, in each process. Reading a member takes one open and one read of the tar
    (and before it of the index); nothing is held open, so instances may be pickled.
    """

    def __init__(self, patterns: Iterable[str], prepared_dir: str | None = None) -> None:
        """Finds the files and their indices.

        Args:
            patterns: files or glob patterns.
            prepared_dir: the folder that `beit3 prepare index` wrote; None scans.

        Raises:
            ConfigError: for a pattern without a match, a file that is unreadable, no tar, damaged, cut off or empty,
                or one that no longer fits its index.
        """
        self.paths = expand_patterns(patterns)
        self._indices = [_open_index(path, prepared_dir) for path in self.paths]
        self._ends = np.cumsum([len(index) for index in self._indices])

    def __len__(self) -> int:
        """Samples in all shards, broken ones included: what stands where must not depend on what can be read."""
        return int(self._ends[-1]) if self.paths else 0

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Members of all shards that are left out, by reason; an example is named with its shard."""
        total: dict[str, Skipped] = {}
        for path, index in zip(self.paths, self._indices, strict=True):
            for reason, found in index.skipped.items():
                count, example = total.get(reason, (0, f"{path}:{found.example}"))
                total[reason] = Skipped(count + found.num_members, example)
        return total

    def name(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        shard, record = self._record(index)
        return _name(self.paths[shard], record)

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes the image of a sample, upright and in RGB.

        Raises:
            BrokenRecord: if it has none, or one that cannot be read.
        """
        shard, record = self._record(index)
        data = _read(self.paths[shard], record, "image")
        try:
            return decode_image(data, min_side)
        except ValueError as error:
            raise BrokenRecord(f"{_name(self.paths[shard], record)}: broken image: {error}") from error

    def caption(self, index: int) -> str:
        """Returns the caption of a sample, without white space around it.

        Raises:
            BrokenRecord: if it has none, or one that cannot be read.
        """
        shard, record = self._record(index)
        data = _read(self.paths[shard], record, "caption")
        try:
            return decode_json_caption(data) if record["caption_is_json"] else decode_caption(data)
        except ValueError as error:
            raise BrokenRecord(f"{_name(self.paths[shard], record)}: broken caption: {error}") from error

    def _record(self, index: int) -> tuple[int, np.void]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        found = self._indices[shard]
        number = index - int(self._ends[shard]) + len(found)
        try:
            return shard, found.record(number)
        except OSError as error:
            raise BrokenRecord(f"{self.paths[shard]}: sample {number}: {error}") from error


def _open_index(tar: str, prepared_dir: str | None) -> ShardIndex | StoredIndex:
    if prepared_dir is not None:
        path = index_path(prepared_dir, tar)
        if os.path.exists(path):
            return StoredIndex(path, tar)
    return scan_shard(tar)


def _name(tar: str, record: np.void) -> str:
    return f"{tar}:{record['key'].decode('utf-8', 'backslashreplace')}"


def _read(tar: str, record: np.void, kind: str) -> bytes:
    extensions, limit = _KINDS[kind]
    offset, size = int(record[kind]["offset"]), int(record[kind]["size"])
    if size == NO_MEMBER:
        raise BrokenRecord(f"{_name(tar, record)}: no {kind} (.{', .'.join(extensions)})")
    if not 0 <= size <= limit:
        raise BrokenRecord(f"{_name(tar, record)}: {kind} of {size} bytes exceeds the limit of {limit}")
    try:
        with open(tar, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except (OSError, OverflowError) as error:
        raise BrokenRecord(f"{_name(tar, record)}: {error}") from error
    if len(data) < size:
        raise BrokenRecord(f"{_name(tar, record)}: only {len(data)} of {size} bytes left; has the shard changed?")
    return data

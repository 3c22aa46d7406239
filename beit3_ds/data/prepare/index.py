"""Writes and verifies the index files of tar shards, in one process per core."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from beit3_ds.config import ConfigError, DataConfig
from beit3_ds.cores import count_cores
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shard_index import StoredIndex, index_path, write_index
from beit3_ds.data.images.shard_scan import scan_shard
from beit3_ds.data.sources import image_format
from beit3_ds.data.workers.pool import Preparation, prepare_in_any_order
from beit3_ds.data.workers.waiting import WaitLimits
from beit3_ds.printing import printable

_MAX_NAMED = 10  # maximum number of changed samples or failed tars that a message names


@dataclass(frozen=True, kw_only=True)
class IndexedShard:
    """Holds the result of `prepare_indices` for one tar."""

    tar: str
    """Path of the tar."""
    action: Literal["written", "kept", "verified", "failed"]
    """What was done with the tar's index; `kept` means that the existing index was up to date."""
    num_samples: int = 0
    """Number of samples in the index."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """Number of skipped tar members for each reason, with an example."""
    error: str = ""
    """Error message if `action` is "failed", otherwise empty."""


def shard_paths(config: DataConfig) -> list[str]:
    """Lists the paths of all tars that a run's config names, without duplicates.

    Raises:
        ConfigError: if a pattern has no match.
    """
    sources = [source for stream in (config.images, config.pairs) for source in stream.sources]
    tars = [source.path for source in sources if image_format(source) == "tar"]
    return list(dict.fromkeys(path for pattern in tars for path in expand_patterns([pattern])))


def describe_folders(config: DataConfig) -> list[str]:
    """Counts the images in every image folder of a run; returns one line of text per folder.

    Raises:
        ConfigError: if a folder cannot be read, or contains no image.
        StorageError: if the file system fails.
    """
    sources = [source for stream in (config.images, config.pairs) for source in stream.sources]
    paths = dict.fromkeys(source.path for source in sources if image_format(source) == "folder")
    return [f"folder {printable(path)}: {len(ImageFolder(path)):,} images; it needs no index" for path in paths]


def describe_indices(shards: Sequence[IndexedShard]) -> str:
    """Summarises the results of `prepare_indices` as a few lines of text."""
    actions = Counter(shard.action for shard in shards)
    done = ", ".join(f"{count} {action}" for action, count in sorted(actions.items()))
    lines = [f"{len(shards)} tars with {sum(shard.num_samples for shard in shards):,} samples: {done or 'none'}"]
    if empty := [shard.tar for shard in shards if shard.action != "failed" and not shard.num_samples]:
        lines.append(f"without samples: {len(empty):,} tars (such as {printable(empty[0])})")
    for reason in sorted({reason for shard in shards for reason in shard.skipped}):
        found = [(shard.tar, shard.skipped[reason]) for shard in shards if reason in shard.skipped]
        total = sum(skipped.num_members for _, skipped in found)
        lines.append(printable(f"left out, {reason}: {total:,} (such as {found[0][0]}:{found[0][1].example})"))
    return "\n".join(lines)


def prepare_indices(
    tars: Sequence[str],
    cache_dir: str,
    *,
    verify: bool = False,
    num_processes: int | None = None,
    timeout_seconds: float = 600,
) -> list[IndexedShard]:
    """Writes an index file for every tar whose index is missing or out of date.

    A failed tar does not stop the others.

    Args:
        tars: paths of the tars.
        cache_dir: folder of the indices; created if missing.
        verify: whether to compare each existing index with its tar, including the CRC-32 of every member. If they
            differ, the tar fails and the index is not rewritten.
        num_processes: number of processes; None starts one per core.
        timeout_seconds: seconds without CPU use after which a process counts as stuck (`data.timeout_seconds`).

    Returns:
        One result per tar, in the order of `tars`.

    Raises:
        ConfigError: if some tars failed. Raised after all other tars are finished; the message names the failed tars.
    """
    num_processes = min(num_processes or count_cores(), len(tars))
    results = {shard.tar: shard for shard in _run(tars, cache_dir, verify, num_processes, timeout_seconds)}
    shards = [results[tar] for tar in tars]
    failed = [shard.error for shard in shards if shard.action == "failed"]
    if failed:
        more = [f"... and {len(failed) - _MAX_NAMED} more"] if len(failed) > _MAX_NAMED else []
        raise ConfigError(
            f"{len(failed)} of {len(tars)} tars failed, the others are done:", *failed[:_MAX_NAMED], *more
        )
    return shards


def _run(
    tars: Sequence[str], cache_dir: str, verify: bool, num_processes: int, timeout_seconds: float
) -> Iterator[IndexedShard]:
    description = "verifying shards" if verify else "indexing shards"
    if num_processes <= 1:
        for tar in tqdm(tars, desc=description, unit="tar", disable=None):
            yield _prepare_index(tar, cache_dir, verify)
        return
    limits = WaitLimits(seconds=timeout_seconds, where="beit3 prepare index")
    work = functools.partial(_prepare_index_in_worker, cache_dir=cache_dir, verify=verify)
    preparation = Preparation(work=work, describe=str, limits=limits, preload=__name__)
    finished = prepare_in_any_order(preparation, tars, num_processes)
    yield from tqdm(finished, total=len(tars), desc=description, unit="tar", disable=None)


def _prepare_index_in_worker(tar: str, note: Callable[[str], None], cache_dir: str, verify: bool) -> IndexedShard:
    note(tar)
    return _prepare_index(tar, cache_dir, verify)


def _prepare_index(tar: str, cache_dir: str, verify: bool) -> IndexedShard:
    path = index_path(cache_dir, tar)
    try:
        stored = _fitting_index(path, tar, must_fit=verify)
        if stored is not None and verify:
            _verify(stored, tar)
        if stored is not None:
            action: Literal["verified", "kept"] = "verified" if verify else "kept"
            return IndexedShard(tar=tar, action=action, num_samples=len(stored), skipped=stored.skipped)
        index = scan_shard(tar, with_checksums=True)
        write_index(index, path)
        return IndexedShard(tar=tar, action="written", num_samples=len(index), skipped=index.skipped)
    except (ConfigError, OSError) as error:
        return IndexedShard(tar=tar, action="failed", error=str(error))


def _fitting_index(path: str, tar: str, must_fit: bool) -> StoredIndex | None:
    if not os.path.exists(path):
        return None
    try:
        return StoredIndex(path, tar)
    except ConfigError:
        if must_fit:
            raise
        return None


def _verify(stored: StoredIndex, tar: str) -> None:
    then, now = stored.load(), scan_shard(tar, with_checksums=True).records
    if then.dtype == now.dtype and np.array_equal(then, now):
        return
    changed = _changed_keys(then, now)
    named = ", ".join(changed[:_MAX_NAMED]) + (", ..." if len(changed) > _MAX_NAMED else "")
    raise ConfigError(
        f"data: {tar} no longer fits its index {stored.path}: {len(changed)} samples differ in offset, name or CRC-32 "
        f"({named}). Fetch the tar again; or, if the change is meant, delete the index and run `beit3 prepare index`."
    )


def _changed_keys(then: NDArray[np.void], now: NDArray[np.void]) -> list[str]:
    old, new = ({record["key"]: record.tolist() for record in records} for records in (then, now))
    return [key.decode("utf-8", "backslashreplace") for key in {**old, **new} if old.get(key) != new.get(key)]

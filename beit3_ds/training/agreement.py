"""Checks before the first step that all ranks have the same files."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import HasFiles, SourceFile, fingerprint, first_difference
from beit3_ds.parallel import Mesh

_SAME_FILES = "Copy the same files to every host (rsync --checksum), or name a folder that all hosts share."
_NAMED = 4  # maximum number of sources named in a message
_WHOLE_BYTES = 1 << 28
_BLOCK_BYTES, _BLOCKS = 1 << 20, 64


def check_same_sources(mesh: Mesh, sources: Mapping[str, HasFiles]) -> None:
    """Checks that all ranks found the same files in every data source, so that they read the same samples.

    All ranks must call this function. Each rank sends one digest of the names, sizes and sample counts of all files. If
    sources differ, one rank also sends its file lists of these sources.

    Args:
        mesh: mesh of all ranks.
        sources: sources that this rank reads, by name; empty on ranks that read no data.

    Raises:
        ConfigError: on all ranks, if sources differ; the message names the hosts, the sources and the first file that
            differs.
    """
    own = {name: fingerprint(source) for name, source in sources.items()}
    digests = mesh.host.gather(hashlib.sha256(json.dumps(own).encode()).hexdigest() if own else None)
    readers = [rank for rank, digest in enumerate(digests) if digest]
    if len({digests[rank] for rank in readers}) <= 1:
        return
    first = readers[0]
    expected = mesh.host.broadcast(own, src=first)
    differing = [name for name, found in own.items() if found != expected.get(name)]
    asked = sorted({name for names in mesh.host.gather(differing) for name in names})[:_NAMED]
    files = mesh.host.broadcast(
        {name: [list(file) for file in sources[name].files()] for name in asked if name in sources}, src=first
    )
    sentences = []
    for name in differing:
        if name in files and name in expected:
            found, theirs = own[name], expected[name]
            listed = [SourceFile(*file) for file in files[name]]
            difference = first_difference(list(sources[name].files()), listed, f"rank {first}")
            sentences.append(
                f"{name} has {found['num_files']} files and {found['num_samples']} samples, {theirs['num_files']} and "
                f"{theirs['num_samples']} on rank {first}; {difference}"
            )
    reports: dict[str, list[int]] = {}
    for rank, report in enumerate(mesh.host.gather("; ".join(sentences))):
        if report:
            reports.setdefault(report, []).append(rank)
    found_there = " And ".join(f"on {mesh.name_ranks(ranks)}: {report}." for report, ranks in reports.items())
    raise ConfigError(
        f"data: not all ranks found the same files as rank {first} (host {mesh.hosts[first]}), so they would train on "
        f"different samples. {found_there} {_SAME_FILES}"
    )


def check_same_files(mesh: Mesh, paths: Mapping[str, str | None]) -> None:
    """Checks that files have the same content on all ranks. Gathers 8 bytes per rank and path.

    A folder is compared by the names and contents of all files in it. Files of more than 256 MiB are compared by size
    and by 64 blocks of 1 MiB spread over the file. All ranks must call this function.

    Args:
        mesh: mesh of all ranks.
        paths: path of each file or folder, by configuration key; None for keys that are not set.

    Raises:
        ConfigError: on all ranks, if a file or folder differs; the message names the key, the path and the ranks that
            differ from rank 0.
    """
    if mesh.num_ranks == 1:
        return
    for key, path in paths.items():
        if path is not None:
            mesh.check_agreement(f"file {key}={path} (its contents differ)", _digest(Path(path)), _SAME_FILES)


def _digest(path: Path) -> str:
    try:
        if path.is_dir():
            names = sorted(found.relative_to(path) for found in path.rglob("*") if found.is_file())
            return json.dumps([(os.fsdecode(name), _digest(path / name)) for name in names])
        size = path.stat().st_size
        if size <= _WHOLE_BYTES:
            return file_sha256(path)
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
        return digest.hexdigest()
    except OSError as error:  # compared like a digest; other ranks would wait for a rank that raises
        return f"unreadable: {error.strerror}"

"""Tests that ranks with different data stop together before the first step, and name the host and the file."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import SourceFile
from tests.ranks import run_ranks

SHARDS = [SourceFile(f"{name}.tar", 100, 10) for name in "abcde"]
WITHOUT_C = [*SHARDS[:2], *SHARDS[3:]]
SHORTER = [*SHARDS[:4], SourceFile("e.tar", 99, 10)]
FEWER = [*SHARDS[:4], SourceFile("e.tar", 100, 9)]


class Listed(list[SourceFile]):
    """Implements a source from a list of files."""

    def __len__(self) -> int:
        return sum(file.num_samples for file in self)

    def files(self) -> list[SourceFile]:
        return list(self)


# Files that ranks 0 to 3 find in two sources; None for a rank that reads none.
CASES: dict[str, tuple[list[Any], list[str]]] = {
    "all alike": ([(SHARDS, SHARDS), None, (SHARDS, SHARDS), (SHARDS, SHARDS)], []),
    "one lacks a shard": (
        [(SHARDS, SHARDS), None, (SHARDS, SHARDS), (SHARDS, WITHOUT_C)],
        ["on rank 3 (host b): second has 4 files and 40 samples, 5 and 50 on rank 0; c.tar is missing. "],
    ),
    "the first lacks a shard": (
        [(WITHOUT_C, SHARDS), None, (SHARDS, SHARDS), (SHARDS, SHARDS)],
        ["on ranks 2-3 (host b): first has 5 files and 50 samples, 4 and 40 on rank 0; c.tar is not on rank 0. "],
    ),
    "two differ in other ways, the first rank reads nothing": (
        [None, (SHARDS, SHARDS), (SHORTER, SHARDS), (FEWER, SHARDS[::-1])],
        [
            "on rank 2 (host b): first has 5 files and 50 samples, 5 and 50 on rank 1; "
            "e.tar has 99 bytes, on rank 1 100. ",
            "on rank 3 (host b): first has 5 files and 49 samples, 5 and 50 on rank 1; "
            "e.tar has 9 samples, on rank 1 10; second has 5 files and 50 samples, 5 and 50 on rank 1; "
            "the same files come in another order. ",
        ],
    ),
}


def compare(folders: list[str]) -> dict[str, str]:
    """Runs every case of differing data or files on one rank; returns the error of each case, or "", by name."""
    import dataclasses

    from beit3_ds.config import ParallelConfig
    from beit3_ds.runtime.process_group import init_process_group
    from beit3_ds.training.agreement import check_same_files, check_same_sources

    mesh = init_process_group(ParallelConfig())
    mesh = dataclasses.replace(mesh, hosts=("a", "a", "b", "b"))
    messages = {}
    for case, (found, _) in CASES.items():
        own = found[mesh.host.rank]
        sources = (
            {} if own is None else {name: Listed(files) for name, files in zip(("first", "second"), own, strict=True)}
        )
        messages[case] = ""
        try:
            check_same_sources(mesh, sources)
        except ConfigError as error:
            messages[case] = str(error)
    os.chdir(folders[mesh.host.rank])
    for path in ("same", "other", "only"):
        messages[path] = ""
        try:
            check_same_files(mesh, {"tokenizers.text.path": path, "training.init_from": None})
        except ConfigError as error:
            messages[path] = str(error)
    mesh.close()
    return messages


def test_all_ranks_are_told_who_differs_in_what(tmp_path: Path) -> None:
    """Catches a rank that compares itself with itself, and a rank that waits forever."""
    folders = [tmp_path / str(rank) for rank in range(4)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        (folder / "same").write_text("same")
        (folder / "other").write_text("another" if rank == 2 else "one")
    (folders[0] / "only").write_text("on rank 0")
    results = run_ranks(compare, 4, [str(folder) for folder in folders])
    assert all(messages == results[0] for messages in results)
    for case, (_, sentences) in CASES.items():
        message = results[0][case]
        assert bool(message) == bool(sentences), message
        assert all(sentence in message for sentence in sentences), message
        assert message.count("samples,") == sum(sentence.count("samples,") for sentence in sentences), message
    assert results[0]["same"] == ""
    assert results[0]["other"].startswith("rank 2 (host b) started with another file tokenizers.text.path=other")
    assert results[0]["only"].startswith("rank 1 (host a), ranks 2-3 (host b) started with another file")


def train(config: str, folders: list[str]) -> tuple[int, str]:
    """Trains on one rank in a separate folder, so that a relative path is a different file on each rank."""
    os.chdir(folders[int(os.environ["RANK"])])
    from beit3_ds.train import main

    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main([config])
    return status, stderr.getvalue()


def test_a_shard_that_one_host_lacks(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Catches ranks that train with different permutations and exit with status 0."""
    own = run_mapping["beit3_ds"]
    for stream in ("images", "pairs", "texts"):
        for part in ("train", "validation"):
            own["data"][stream][part] = [str(Path(path).absolute()) for path in own["data"][stream][part]]
    shard = Path(own["data"]["images"]["validation"][0])
    folders = [tmp_path / "host_a", tmp_path / "host_b"]
    for folder, names in zip(folders, ("abc", "ab"), strict=True):
        (folder / "shards").mkdir(parents=True)
        for name in names:
            (folder / "shards" / f"{name}.tar").write_bytes(shard.read_bytes())
    own["data"]["images"]["train"] = ["shards/*.tar"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(run_mapping))
    for rank, (status, line) in enumerate(run_ranks(train, 2, str(config), [str(folder) for folder in folders])):
        assert status == 2, line
        assert line.startswith(f"error on rank {rank}: data: not all ranks found the same files as rank 0"), line
        assert "data.images.train[0] (shards/*.tar) has 2 files" in line and "c.tar is missing" in line, line
        assert line.count("\n") == 1, line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

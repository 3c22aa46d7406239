"""Tests runs that resume with changed files: the data state of the checkpoint, and the steps after it."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import RunConfig
from beit3_ds.data.order.run import POSITIONS
from beit3_ds.data.steps import StepDataset
from beit3_ds.tokenizers.text import TextTokenizer
from tests.data.conftest import BuildConfig, WriteTar
from tests.tasks.pretraining.samples import open_steps


@pytest.fixture
def files(sample_files: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Copies the sample files, so that the test can change them."""
    folder = tmp_path / "data"
    shutil.copytree(Path(sample_files["images"]).parent, folder)
    return {name: str(folder / Path(path).name) for name, path in sample_files.items()}


def _names(dataset: StepDataset, first: int, last: int) -> dict[str, list[str]]:
    """Returns the names of the samples of some steps, by stream."""
    names: dict[str, list[str]] = {"images": [], "pairs": [], "texts": []}
    for step in range(first, last):
        for batch in dataset[step].micro_batches:
            borders = (0, batch.num_images, batch.num_images + batch.num_pairs, None)
            for stream, start, stop in zip(names, borders, borders[1:], strict=False):
                names[stream] += batch.sample_names[start:stop]
    return names


def _data_after(dataset: StepDataset, step: int) -> dict[str, Any]:
    """Returns the data state that a checkpoint after `step` has."""
    found: dict[str, Any] = json.loads(json.dumps({POSITIONS: dataset.order.state_after(step)}))
    return found


def _plain(config: RunConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=dict))
    return plain


def test_unchanged_files_continue_bit_for_bit(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    config = build_config()
    undisturbed = open_steps(config, tokenizer, 0, 1)
    resumed = open_steps(config, tokenizer, 0, 1)
    assert resumed.order.resume(5, _data_after(undisturbed, 5), _plain(config)) == []
    for step in (5, 8):
        assert resumed[step].fingerprint() == undisturbed[step].fingerprint()
    assert _data_after(resumed, 9) == _data_after(undisturbed, 9)


def test_a_checkpoint_without_positions_continues_bit_for_bit(
    build_config: BuildConfig, sample_files: dict[str, str], tokenizer: TextTokenizer
) -> None:
    folder = Path(sample_files["pairs"]).parent
    sources = [{"path": str(folder / f"pairs-{i}.tar"), "weight": i + 1} for i in range(2)]
    config = build_config(data={"pairs": {"train": sources, "samples_per_step": 4}})
    undisturbed, resumed = (open_steps(config, tokenizer, 0, 1) for _ in range(2))
    (line,) = resumed.order.resume(7, {}, _plain(config))
    assert "an older version wrote it" in line
    assert "repeats cannot be excluded" in line
    for step in (7, 9):
        assert resumed[step].fingerprint() == undisturbed[step].fingerprint()


def test_grown_files_repeat_nothing(
    build_config: BuildConfig, tokenizer: TextTokenizer, files: dict[str, str], write_tar: WriteTar, png: bytes
) -> None:
    config = build_config(images=4, pairs=4, texts=4, files=files)
    before = open_steps(config, tokenizer, 0, 1)
    seen = _names(before, 0, 3)
    data = _data_after(before, 3)
    folder = Path(files["images"]).parent
    write_tar(folder / "images-2.tar", {f"new{i}.png": png for i in range(6)})
    members: dict[str, bytes] = {}
    for i in range(3):
        members |= {f"new{i}.png": png, f"new{i}.txt": b"red bird"}
    write_tar(folder / "pairs-2.tar", members)
    with Path(files["texts"]).open("a") as file:
        file.write("\n\n" + "\n\n".join(["green boats near old trees in snow"] * 5))

    after = open_steps(config, tokenizer, 0, 1)
    lines = after.order.resume(3, data, _plain(config))
    assert any("data.images: source" in line and "grew from 22 to 28" in line for line in lines)
    assert any("data.pairs: source" in line and "grew from 13 to 16" in line for line in lines)
    assert any("data.texts: source" in line and "grew from" in line for line in lines)
    for stream, names in _names(after, 3, 7).items():
        seen[stream] += names
    # catches an order of the new sizes that begins anywhere in its epoch
    assert set(Counter(seen["images"]).values()) == {1} and len(seen["images"]) == 28
    assert set(Counter(seen["pairs"][:16]).values()) == {1} and len(set(seen["pairs"][:16])) == 16
    assert set(Counter(seen["texts"]).values()) == {1}


def test_all_ranks_continue_with_the_same_samples(
    build_config: BuildConfig, tokenizer: TextTokenizer, files: dict[str, str], write_tar: WriteTar, png: bytes
) -> None:
    config = build_config(files=files)
    data = _data_after(open_steps(config, tokenizer, 0, 1), 3)
    write_tar(Path(files["images"]).parent / "images-2.tar", {f"new{i}.png": png for i in range(6)})

    def resumed(rank: int, size: int) -> StepDataset:
        dataset = open_steps(config, tokenizer, rank, size)
        dataset.order.resume(3, data, _plain(config))
        return dataset

    alone, ranks = resumed(0, 1), [resumed(rank, 3) for rank in range(3)]
    for step in (3, 6):
        shares = [_names(rank, step, step + 1) for rank in ranks]
        for stream, names in _names(alone, step, step + 1).items():
            assert [name for share in shares for name in share[stream]] == names


def test_inserted_and_exchanged_files_are_noticed(
    build_config: BuildConfig, tokenizer: TextTokenizer, files: dict[str, str], write_tar: WriteTar, png: bytes
) -> None:
    config = build_config(files=files)
    data = _data_after(open_steps(config, tokenizer, 0, 1), 3)
    folder = Path(files["images"]).parent
    write_tar(folder / "images-00.tar", {"first.png": png})  # sorts before the others
    text = Path(files["texts"])
    text.write_text("snow near the old green trees\n\n" + text.read_text())
    lines = open_steps(config, tokenizer, 0, 1).order.resume(3, data, _plain(config))
    assert len(lines) == 2
    assert all("numbered differently" in line and "repeats" in line for line in lines)
    assert {line.split(":")[0] for line in lines} == {"data.images", "data.texts"}


def test_names_that_are_not_utf8_have_a_position(
    build_config: BuildConfig, tokenizer: TextTokenizer, tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    write_tar(tmp_path / os.fsdecode(b"images-\xff.tar"), {f"{i}.png": png for i in range(4)})
    config = build_config(files={"images": str(tmp_path / "images-*.tar")})
    dataset = open_steps(config, tokenizer, 0, 1)
    assert dataset.order.resume(2, _data_after(dataset, 2), _plain(config)) == []


def test_a_stream_that_is_left_out_keeps_its_place(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    config = build_config()
    whole = open_steps(config, tokenizer, 0, 1)
    data = _data_after(whole, 3)
    without = build_config(pairs=0)
    dataset = open_steps(without, tokenizer, 0, 1)
    dataset.order.resume(3, data, _plain(config))
    back = open_steps(config, tokenizer, 0, 1)
    back.order.resume(5, _data_after(dataset, 5), _plain(without))
    assert _names(back, 5, 6)["pairs"] == _names(whole, 3, 4)["pairs"]

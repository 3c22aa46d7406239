"""Tests the files of drawn scenes."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3_ds.sample_data.write_scenes import class_names, main


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes")
    assert main([str(path), "--train", "6", "--validation", "3", "--size", "32"]) == 0
    return path


def test_every_image_is_there(folder: Path) -> None:
    for split, count in (("train", 6), ("validation", 3)):
        questions, statements = (lines(folder / f"{kind}-{split}.jsonl") for kind in ("questions", "statements"))
        assert len(questions) == 5 * count and len(statements) == 2 * count
        names = {question["image"] for question in questions}
        names |= {statement[side] for statement in statements for side in ("left", "right")}
        assert len(names) == count + 4 * count
        assert all(Image.open(folder / name).size == (32, 32) for name in names)
        assert len(list((folder / "classes" / split).glob("*/*.png"))) == count
    images = json.loads((folder / "captions.json").read_text())["images"]
    assert [image["split"] for image in images] == ["train"] * 6 + ["val"] * 3
    assert all((folder / image["filepath"] / image["filename"]).is_file() for image in images)


def test_sentences_do_not_tell_their_label(folder: Path) -> None:
    statements = lines(folder / "statements-train.jsonl")
    groups = {statement["group"] for statement in statements}
    for group in groups:  # catches labels that a reader of the text alone could guess
        assert sorted(line["label"] for line in statements if line["group"] == group) == [False, True]


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert main([str(tmp_path / seed), "--train", "6", "--validation", "3", "--size", "32", "--seed", seed]) == 0
    ours, again, other = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (folder, tmp_path / "0", tmp_path / "1")
    )
    assert ours == again != other
    assert ours["questions-train.jsonl"] != ours["questions-validation.jsonl"]


def test_classes_have_names(folder: Path) -> None:
    assert (folder / "classes.txt").read_text().splitlines()[0] == "s00000000 red circle"
    assert len(set(class_names().values())) == 36


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--train", "0"])

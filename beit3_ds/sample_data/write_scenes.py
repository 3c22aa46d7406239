"""Writes drawn scenes with the files of all tasks: `python -m beit3_ds.sample_data.write_scenes --help`.

    images/{train,validation}/NUMBER.png
    questions-{train,validation}.jsonl       image, question, answer, question_type, answer_type
    statements-{train,validation}.jsonl      left, right, sentence, label, group; a sentence is true once and false once
    captions.json                            images, five captions each, in the format of Karpathy's splits
    classes/{train,validation}/ID/NUMBER.png one object per image; classes.txt has the class names
    segmentation/                            landscapes with shapes and their label maps, in ADE20K's folders
    objects-{train,validation}.json          images with boxes and masks of shapes, in COCO's format
    text.txt                                 all training texts, for a text tokenizer

Equal arguments and an equal Pillow version give equal bytes.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from beit3_ds.sample_data.label_scenes import write_label_scenes
from beit3_ds.sample_data.object_scenes import write_object_scenes
from beit3_ds.sample_data.scenes import (
    COLORS,
    SHAPES,
    Scene,
    SceneObject,
    ask_questions,
    draw_image,
    draw_pair_for,
    draw_scene,
    draw_statement,
)

SPLITS = ("train", "validation")
NUM_PLACES = 4


def write_scenes(folder: Path, num_train: int, num_validation: int, seed: int = 0, size: int = 64) -> None:
    """Writes scenes with the files of all tasks.

    A split has N scenes and N statements. It also has N images for each of these tasks: classification, segmentation
    and detection. Each statement has one pair of images for which it is true, and one pair for which it is false.

    Args:
        folder: folder to write to; it is created if missing, and existing files are replaced.
        num_train: N for the training split.
        num_validation: N for the validation split.
        seed: seed of all random draws.
        size: side in pixels of most images, which are square. For images with label maps, `size` is the shorter side,
            and the longer side is up to 1.5 times `size`. For images with boxes, the longer side is 2 times `size`, and
            the shorter side is at least 1.5 times `size`.
    """
    texts: list[str] = []
    captions: list[dict[str, Any]] = []
    for split, count in zip(SPLITS, (num_train, num_validation), strict=True):
        rng = random.Random(f"{seed} {split}")
        scenes = [draw_scene(rng) for _ in range(count)]
        for number, scene in enumerate(scenes):
            _save(folder / _image(split, number), scene, rng, size)
            captions.append(_karpathy_entry(len(captions), split, number, scene))
        questions = [
            {"id": f"{number}-{kind}", "image": _image(split, number), **question._asdict()}
            for number, scene in enumerate(scenes)
            for kind, question in enumerate(ask_questions(scene, rng))
        ]
        _write_lines(folder / f"questions-{split}.jsonl", questions)
        statements = list(_write_statements(folder, split, count, rng, size))
        _write_lines(folder / f"statements-{split}.jsonl", statements)
        write_classes(folder / "classes" / split, count, rng, size)
        write_label_scenes(folder / "segmentation", split, count, random.Random(f"{seed} labels {split}"), size)
        write_object_scenes(folder, split, count, random.Random(f"{seed} objects {split}"), 2 * size)
        if split == "train":
            texts += [question["question"] for question in questions] + [line["sentence"] for line in statements]
            texts += [sentence["raw"] for image in captions for sentence in image["sentences"]]
    (folder / "captions.json").write_text(json.dumps({"dataset": "scenes", "images": captions}))
    (folder / "classes.txt").write_text("".join(f"{key} {name}\n" for key, name in class_names().items()))
    (folder / "text.txt").write_text("\n".join(texts) + "\n")


def class_names() -> dict[str, str]:
    """Returns the name of each class, such as `red circle`, by folder name."""
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    return {f"s{number:08}": name for number, name in enumerate(names)}


def _image(split: str, number: int) -> str:
    return f"images/{split}/{number:06}.png"


def _save(path: Path, scene: Scene, rng: random.Random, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_image(scene, rng, size).save(path)


def _karpathy_entry(number: int, split: str, place: int, scene: Scene) -> dict[str, Any]:
    """Returns the JSON object of an image in the format of Karpathy's splits. The values of `cocoid` have gaps, like
    COCO's ids.
    """
    captions = scene.captions()
    sentences = [
        {"raw": caption, "tokens": caption.replace(",", "").split(), "imgid": number, "sentid": 5 * number + i}
        for i, caption in enumerate(captions)
    ]
    folder, _, name = _image(split, place).rpartition("/")
    return {
        "cocoid": 9 + 16 * number,
        "imgid": number,
        "filepath": folder,
        "filename": name,
        "split": "train" if split == "train" else "val",
        "sentids": [sentence["sentid"] for sentence in sentences],
        "sentences": sentences,
    }


def _write_statements(folder: Path, split: str, count: int, rng: random.Random, size: int) -> Iterable[dict[str, Any]]:
    """Writes two pairs of images per sentence, and yields one line of the statements file per pair.

    The sentence is true for one pair and false for the other.
    """
    for group in range(count):
        statement = draw_statement(rng)
        labels = [True, False]
        rng.shuffle(labels)
        for number, label in enumerate(labels):
            pair = draw_pair_for(statement, label, rng)
            names = [f"images/statements-{split}/{group:06}-{number}-img{side}.png" for side in range(2)]
            for name, scene in zip(names, pair, strict=True):
                _save(folder / name, scene, rng, size)
            line = {"id": f"{group}-{number}", "left": names[0], "right": names[1], "sentence": statement.sentence}
            yield {**line, "label": label, "group": str(group)}


def write_classes(folder: Path, count: int, rng: random.Random, size: int) -> None:
    """Writes images into one folder per class, cycling through the classes of `class_names`. Each image shows one
    object.

    Args:
        folder: folder of the split.
        count: number of images.
        rng: random generator.
        size: side of the images in pixels.
    """
    keys = list(class_names().items())
    for number in range(count):
        key, name = keys[number % len(keys)]
        color, shape = name.split()
        scene = Scene((SceneObject(color, shape, rng.randrange(NUM_PLACES)),))
        _save(folder / key / f"{number:06}.png", scene, rng, size)


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and writes all files."""
    parser = argparse.ArgumentParser(
        prog="python -m beit3_ds.sample_data.write_scenes",
        description="Draw scenes of coloured shapes, with the files of all tasks, such as captions and label maps.",
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="scenes for training (default: 2000)")
    parser.add_argument("--validation", type=int, default=200, help="scenes for validation (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (default: 0)")
    parser.add_argument(
        "--size", type=int, default=64, help="pixels on a side; scenes with boxes double it (default: 64)"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.train, arguments.validation) < 1 or arguments.size < 16:
        parser.error("--train and --validation must be at least 1, and --size at least 16")
    write_scenes(arguments.folder, arguments.train, arguments.validation, arguments.seed, arguments.size)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Generates hostile files of the dense tasks: annotated objects, label maps, and results of both."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.tasks.detection.categories import Categories, Category
from beit3_ds.tasks.detection.files import read_objects
from beit3_ds.tasks.detection.result_files import read_result_files
from beit3_ds.tasks.detection.segmentations import draw_in_box, whole_segmentation
from beit3_ds.tasks.segmentation.files import LabelMaps
from beit3_ds.tasks.segmentation.result_folder import score_folder
from tests.hostile.annotation_files import images_beside, json_writer
from tests.hostile.corpus import HostileKind, read_records
from tests.hostile.image_files import damaged_image, picture
from tests.hostile.values import ESCAPES, damage_bytes, replace_file

SIZE = (6, 8)  # height and width of the images
POLYGON = [[1.0, 1.0, 5.0, 1.0, 5.0, 4.0]]
RUN_LENGTHS = {"size": list(SIZE), "counts": [10, 20, 18]}
COMPRESSED = {"size": list(SIZE), "counts": "`1"}
BOX = [1, 1, 4, 3]
OBJECTS: dict[str, Any] = {
    "images": [{"id": number, "file_name": f"{number}.png", "width": 8, "height": 6} for number in (1, 2)],
    "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
    "annotations": [
        {"id": number, "image_id": 1 + number % 2, "category_id": 3, "bbox": BOX, "iscrowd": 0, "segmentation": shape}
        for number, shape in enumerate((POLYGON, RUN_LENGTHS, COMPRESSED, POLYGON * 2))
    ],
}
FOUND = [
    {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": BOX, "segmentation": COMPRESSED},
    {"image_id": 2, "category_id": 7, "score": 0.25, "bbox": BOX, "segmentation": RUN_LENGTHS},
]
CATEGORIES = Categories([Category(3, "dog"), Category(7, "cat")], "the annotations")
NUM_CLASSES = 4


def _read_objects(path: Path) -> None:
    """Reads all that training and evaluation read of an annotation file, and draws the masks."""
    objects = read_objects(str(path), images_beside(path), with_masks=True)
    objects.check_images()
    list(objects.files())

    def draw(index: int) -> None:
        for found in objects.objects(index):
            assert found.segmentation is not None
            draw_in_box(found.segmentation, objects.size(index), found.box)
            if objects.size(index) == SIZE:
                whole_segmentation(found.segmentation, SIZE)

    read_records(len(objects), objects.name, objects.image, draw)


def _read_results(path: Path) -> None:
    read_result_files([str(path)], {1: SIZE, 2: SIZE}, CATEGORIES)


def _label_map(draw: random.Random) -> bytes:
    match draw.randrange(8):
        case 0:
            return damaged_image(draw)
        case 1:
            return picture("PNG", draw.choice([(8, 7), (9, 9), (1, 1), (20_000, 20_000)]), draw.choice(["L", "1"]))
        case 2:
            return picture("PNG", (16, 16), draw.choice(["RGB", "RGBA", "I;16", "P", "LA", "1"]))
        case 3:
            values = np.full((16, 16), draw.choice([NUM_CLASSES, NUM_CLASSES + 1, 254, 255]), dtype=np.uint8)
        case _:
            values = np.arange(256, dtype=np.uint8).reshape(16, 16) % NUM_CLASSES + 1
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return damage_bytes(buffer.getvalue(), draw) if draw.random() < 0.3 else buffer.getvalue()


def _write_label_maps(folder: Path, draw: random.Random) -> Path:
    """Writes images, their label maps and predictions, in ADE20K's form; some of the PNG files are hostile."""
    for name in ("a/1", "a/2", "b/3"):
        for kind in ("images", "labels", "predictions"):
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
            good = picture("PNG", (16, 16), "RGB") if kind == "images" else _good_labels()
            (folder / kind / f"{name}.png").write_bytes(good)
    changed = folder / draw.choice(["labels", "labels", "predictions", "images"]) / draw.choice(["a/1.png", "b/3.png"])
    match draw.randrange(5):
        case 0:
            replace_file(changed, draw)
        case 1:
            changed.unlink()
        case 2:
            (changed.parent / f"{ESCAPES}.png").write_bytes(_label_map(draw))
        case _:
            changed.write_bytes(_label_map(draw))
    return folder


def _good_labels() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % NUM_CLASSES + 1).save(buffer, "PNG")
    return buffer.getvalue()


def _open(folder: Path) -> LabelMaps:
    return LabelMaps(ImageFolder(str(folder / "images")), str(folder / "labels"), NUM_CLASSES, zero_is_ignored=True)


def _read_label_maps(folder: Path) -> None:
    labels = _open(folder)
    read_records(len(labels), labels.name, labels.read)


def _score_predictions(folder: Path) -> None:
    score_folder(str(folder / "predictions"), [_open(folder)], NUM_CLASSES)


DENSE = {
    "annotated objects": HostileKind(json_writer("objects.json", OBJECTS), _read_objects),
    "results of detection": HostileKind(json_writer("found.json", FOUND), _read_results),
    "label maps": HostileKind(_write_label_maps, _read_label_maps),
    "results of segmentation": HostileKind(_write_label_maps, _score_predictions),
}

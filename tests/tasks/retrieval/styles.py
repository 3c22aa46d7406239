"""Writes scenes in two drawing styles; models train on one style and are tested on both."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from beit3_ds.sample_data.scenes import COLORS, Scene, SceneObject, draw_image, draw_scene, draw_shape

_OVERSAMPLING = 4

Draw = Callable[[Scene, random.Random, int], Image.Image]


def draw_crayon(scene: Scene, rng: random.Random, size: int) -> Image.Image:
    """Draws a scene as hatched, outlined strokes on speckled paper; training scenes have flat paint on grey."""
    side = size * _OVERSAMPLING
    light = rng.randint(195, 235)
    paper = tuple(light + rng.randint(-15, 15) for _ in range(3))
    image = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(image)
    for _ in range(80):
        x, y, radius = rng.uniform(0, side), rng.uniform(0, side), side * rng.uniform(0.004, 0.012)
        shade = tuple(round(value * rng.uniform(0.8, 1.05)) for value in paper)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    for found in scene.objects:
        row, column = divmod(found.place, 2)
        radius = side * rng.uniform(0.14, 0.21)
        x = side * (0.25 + 0.5 * column + rng.uniform(-0.04, 0.04))
        y = side * (0.25 + 0.5 * row + rng.uniform(-0.04, 0.04))
        _draw_strokes(image, found, (round(x), round(y)), round(radius), rng)
    return image.resize((size, size), Image.Resampling.BOX)


def _draw_strokes(
    image: Image.Image, found: SceneObject, centre: tuple[int, int], radius: int, rng: random.Random
) -> None:
    """Draws the strokes and outline of one shape, clipped to the shape of the other style."""
    box = 2 * radius
    shape = Image.new("L", (box, box))
    draw_shape(ImageDraw.Draw(shape), found.shape, radius, radius, radius - 1, (255,))
    strokes = Image.new("L", (box, box))
    draw, slant, step = ImageDraw.Draw(strokes), rng.choice((-box, box)), max(4, radius // 4)
    for start in range(-box, 2 * box, step):
        draw.line((start, 0, start + slant, box), fill=255, width=round(step * rng.uniform(0.5, 0.8)))
    inside = shape.filter(ImageFilter.MinFilter(2 * max(1, radius // 12) + 1))
    outline = ImageChops.subtract(shape, inside)
    mask = ImageChops.lighter(ImageChops.multiply(strokes, shape), outline)
    shade = rng.uniform(0.75, 1.1)
    color = tuple(min(255, round(shade * value)) for value in COLORS[found.color])
    image.paste(color, (centre[0] - radius, centre[1] - radius), mask)


def write_pairs(folder: Path, name: str, draw: Draw, scenes: list[Scene], seed: int, size: int) -> None:
    """Writes NAME.jsonl and its images, with five captions per image, in the format `caption_lines`."""
    rng = random.Random(f"{seed} {name}")
    (folder / name).mkdir(parents=True)
    lines = []
    for number, scene in enumerate(scenes):
        path = f"{name}/{number:05}.png"
        draw(scene, rng, size).save(folder / path)
        lines.append({"image": path, "captions": scene.captions()})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_styles(folder: Path, seed: int, num_train: int, num_validation: int, size: int) -> None:
    """Writes painted training scenes, a copy with captions of other images, and test scenes in both styles.

    No two test scenes have equal objects, and no training scene has the objects of a test scene.
    """
    rng = random.Random(seed)
    tested: dict[frozenset[str], Scene] = {}
    while len(tested) < num_validation:
        scene = draw_scene(rng, rng.choice((2, 3)))
        tested.setdefault(frozenset(map(str, scene.objects)), scene)
    trained: list[Scene] = []
    while len(trained) < num_train:
        scene = draw_scene(rng)
        if frozenset(map(str, scene.objects)) not in tested:
            trained.append(scene)
    write_pairs(folder, "train", draw_image, trained, seed, size)
    write_pairs(folder, "seen", draw_image, list(tested.values()), seed, size)
    write_pairs(folder, "unseen", draw_crayon, list(tested.values()), seed, size)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    captions = [line["captions"] for line in lines]
    rng.shuffle(captions)
    shuffled = [{**line, "captions": other} for line, other in zip(lines, captions, strict=True)]
    (folder / "shuffled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shuffled))

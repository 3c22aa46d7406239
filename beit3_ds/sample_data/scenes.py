"""Draws scenes of coloured shapes, and writes texts about them: captions, questions with answers, and statements.

A scene has up to three objects, in different quarters of a square image. All objects of a scene have different colours
and shapes, so "the red one" is unambiguous. All random draws use the caller's generator.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (42, 157, 62),
    "blue": (40, 80, 220),
    "yellow": (245, 200, 40),
    "purple": (138, 50, 170),
    "orange": (242, 120, 20),
}
"""RGB value of each colour, before random shading."""
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
"""Names of all shapes."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
"""Names of the quarters of an image, in reading order."""

_OVERSAMPLING = 4


class SceneObject(NamedTuple):
    """Describes a coloured shape in one quarter of a scene."""

    color: str
    shape: str
    place: int
    """Index into `PLACES` of the quarter of the image that contains the object."""

    def __str__(self) -> str:
        """Returns the object in words with an article, such as `a red circle`."""
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Holds the objects of a drawn scene, in reading order."""

    objects: tuple[SceneObject, ...]

    def caption(self) -> str:
        """Returns the canonical caption, such as `a red circle, a blue ring and a green bar`."""
        return _join([str(found) for found in self.objects])

    def captions(self) -> list[str]:
        """Returns five captions of the scene; the canonical caption is first."""
        places = _join([f"{found} at the {PLACES[found.place]}" for found in self.objects])
        backwards = _join([str(found) for found in reversed(self.objects)])
        short = self.caption()
        return [short, f"there is {short}", f"a picture of {short}", places, f"we see {backwards}"]

    def holds(self, color: str = "", shape: str = "") -> bool:
        """Returns whether an object has the given colour and shape; an empty string matches any colour or shape."""
        return any(color in ("", found.color) and shape in ("", found.shape) for found in self.objects)


class Question(NamedTuple):
    """Holds a question about a scene, and the only right answer."""

    question: str
    answer: str
    question_type: str
    """First words of the question, such as `what color is the`; equal for all questions of one type."""
    answer_type: str
    """Type of the answer: `yes/no`, `number` or `other`."""


class Statement(NamedTuple):
    """Holds a sentence about two images, and a function that decides whether the sentence is true."""

    sentence: str
    rule: Callable[[Scene, Scene], bool]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def draw_scene(rng: random.Random, num_objects: int | None = None) -> Scene:
    """Draws a random scene with `num_objects` objects, or with one to three objects if None."""
    count = num_objects or rng.randint(1, 3)
    colors, shapes = rng.sample(list(COLORS), count), rng.sample(SHAPES, count)
    places = sorted(rng.sample(range(len(PLACES)), count))
    return Scene(tuple(map(SceneObject, colors, shapes, places)))


def draw_image(scene: Scene, rng: random.Random, size: int = 64) -> Image.Image:
    """Draws a scene as an RGB image of `size` x `size` pixels.

    The grey of the background, and each object's shade, size and exact position, are random.
    """
    side = size * _OVERSAMPLING
    grey = rng.randint(215, 250)
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    for found in scene.objects:
        shade = rng.uniform(0.88, 1.08)
        color = tuple(min(255, round(shade * value)) for value in COLORS[found.color])
        row, column = divmod(found.place, 2)
        radius = side * rng.uniform(0.15, 0.2)
        x = side * (0.25 + 0.5 * column + rng.uniform(-0.04, 0.04))
        y = side * (0.25 + 0.5 * row + rng.uniform(-0.04, 0.04))
        draw_shape(draw, found.shape, x, y, radius, color)
    return image.resize((size, size), Image.Resampling.BOX)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, color: tuple[int, ...]
) -> None:
    """Draws one of the shapes in `SHAPES`, filled with one colour.

    Args:
        draw: image to draw on.
        shape: name of the shape.
        x: horizontal position of the centre in pixels.
        y: vertical position of the centre in pixels.
        radius: half the width and height of the shape's box in pixels.
        color: value of each channel of the image.
    """
    box = (x - radius, y - radius, x + radius, y + radius)
    thin = radius * 0.35
    match shape:
        case "circle":
            draw.ellipse(box, fill=color)
        case "ring":
            draw.ellipse(box, outline=color, width=round(radius * 0.4))
        case "square":
            draw.rectangle(box, fill=color)
        case "bar":
            draw.rectangle((box[0], y - thin, box[2], y + thin), fill=color)
        case "cross":
            draw.rectangle((box[0], y - thin, box[2], y + thin), fill=color)
            draw.rectangle((x - thin, box[1], x + thin, box[3]), fill=color)
        case "triangle":
            draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=color)
        case _:
            raise AssertionError(f"no drawing for the shape {shape}")


def ask_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Yields five questions about a scene, with answers.

    The questions are about an object's colour, shape and place, the number of objects, and whether a colour occurs. The
    answer to the last question is "yes" or "no" with equal probability.
    """
    found = rng.choice(scene.objects)
    yield Question(f"what color is the {found.shape}?", found.color, "what color is the", "other")
    found = rng.choice(scene.objects)
    yield Question(f"what shape is {found.color}?", found.shape, "what shape is", "other")
    found = rng.choice(scene.objects)
    yield Question(f"where is the {found.shape}?", PLACES[found.place], "where is the", "other")
    yield Question("how many objects are there?", str(len(scene.objects)), "how many", "number")
    is_there = rng.random() < 0.5
    here = {found.color for found in scene.objects}
    colors = [color for color in COLORS if (color in here) == is_there]
    question = f"is there a {rng.choice(colors)} object?"
    yield Question(question, "yes" if is_there else "no", "is there a", "yes/no")


def draw_statement(rng: random.Random) -> Statement:
    """Draws a random statement about a pair of images. On average, half of the statements are about both images, and
    the others are about the left or the right image only.
    """
    if rng.random() < 0.5:
        color, shape, words = rng.choice(list(COLORS)), "", "something {}"
    else:
        color, shape, words = "", rng.choice(SHAPES), "a {}"
    thing = words.format(color or shape)
    kind = rng.choice(("left", "right", "both", "neither"))
    if kind == "left":
        return Statement(f"the left image shows {thing}", lambda left, right: left.holds(color, shape))
    if kind == "right":
        return Statement(f"the right image shows {thing}", lambda left, right: right.holds(color, shape))
    if kind == "both":
        both = f"both images show {thing}"
        return Statement(both, lambda left, right: left.holds(color, shape) and right.holds(color, shape))
    neither = f"neither image shows {thing}"
    return Statement(neither, lambda left, right: not (left.holds(color, shape) or right.holds(color, shape)))


def draw_pair_for(statement: Statement, label: bool, rng: random.Random) -> tuple[Scene, Scene]:
    """Draws two scenes for which a statement is true (`label` True) or false (`label` False)."""
    while True:
        left, right = draw_scene(rng), draw_scene(rng)
        if statement.rule(left, right) == label:
            return left, right

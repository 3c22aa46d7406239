"""Tests drawn scenes and the statements about them."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.sample_data.scenes import (
    COLORS,
    PLACES,
    Scene,
    SceneObject,
    ask_questions,
    draw_image,
    draw_pair_for,
    draw_scene,
    draw_statement,
)

SEEDS = st.integers(0, 10**6)


@given(SEEDS)
def test_objects_differ(seed: int) -> None:
    objects = draw_scene(random.Random(seed)).objects
    for values in zip(*objects, strict=True):
        assert len(set(values)) == len(objects) <= 3
    assert [found.place for found in objects] == sorted(found.place for found in objects)


def test_captions() -> None:
    scene = Scene((SceneObject("red", "circle", 0), SceneObject("blue", "bar", 3)))
    assert scene.caption() == "a red circle and a blue bar"
    assert Scene((SceneObject("orange", "ring", 1),)).caption() == "an orange ring"
    assert scene.captions()[3:] == [
        "a red circle at the top left and a blue bar at the bottom right",
        "we see a blue bar and a red circle",
    ]
    assert Scene((*scene.objects[:1], SceneObject("green", "ring", 1), *scene.objects[1:])).caption() == (
        "a red circle, a green ring and a blue bar"
    )


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_images_show_their_objects(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    pixels = np.asarray(draw_image(scene, rng, 32), dtype=np.float64)
    quarters = [pixels[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
    here = {found.place: found for found in scene.objects}
    for place in range(len(PLACES)):
        spread = (quarters[place].max(2) - quarters[place].min(2)).ravel()
        assert (spread.max() > 60) == (place in here)  # catches an object in another quarter
        if place in here:
            vivid = quarters[place].reshape(-1, 3)[spread > 0.9 * spread.max()].mean(0)
            nearest = min(COLORS, key=lambda name: float(np.abs(vivid - COLORS[name]).sum()))
            assert nearest == here[place].color


@given(SEEDS)
def test_answers_are_true(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    color, shape, place, number, presence = ask_questions(scene, rng)
    assert scene.holds(color.answer, color.question.removeprefix("what color is the ").rstrip("?"))
    assert scene.holds(shape.question.split()[3].rstrip("?"), shape.answer)
    asked = place.question.removeprefix("where is the ").rstrip("?")
    assert [PLACES[found.place] for found in scene.objects if found.shape == asked] == [place.answer]
    assert number.answer == str(len(scene.objects))
    assert (presence.answer == "yes") == scene.holds(presence.question.split()[3])


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.booleans())
def test_statements_have_the_label_that_was_asked_for(seed: int, label: bool) -> None:
    rng = random.Random(seed)
    statement = draw_statement(rng)
    left, right = draw_pair_for(statement, label, rng)
    thing = statement.sentence.split()[-1]
    shown = [scene.holds(thing if thing in COLORS else "", "" if thing in COLORS else thing) for scene in (left, right)]
    expected = {"left": shown[0], "right": shown[1], "both": all(shown), "neither": not any(shown)}
    assert expected[next(word for word in statement.sentence.split() if word in expected)] == label

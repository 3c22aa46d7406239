"""Tests how a configuration names its task, and the errors for wrong names and keys."""

from typing import Any

import pytest

from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.tasks import build_task
from beit3_ds.tasks.pretraining.task import Pretraining
from tests.run_config import small_run_mapping
from tests.tasks.rotation import Rotation


def build(section: Any = None, **model: Any) -> Any:
    mapping = small_run_mapping(0, **model)
    mapping["beit3_ds"].pop("task")
    if section is not None:
        mapping["beit3_ds"]["task"] = section
    return build_task(build_run_config(mapping))


def test_the_task_is_pretraining_unless_named() -> None:
    assert type(build()) is type(build({"name": "pretraining"})) is Pretraining
    assert type(build({"name": "tests.tasks.rotation"})) is Rotation


def test_settings_are_those_of_the_section() -> None:
    task = build({"image_mask_ratio": 0.25, "loss_weights": {"pair_mim": 2}})
    assert task.settings.image_mask_ratio == 0.25 and task.settings.text_mask_ratio == 0.15
    assert [term.weight for term in task.terms] == [1, 1, 2, 1]
    described = task.describe()
    assert (described["name"], described["image_mask_ratio"], described["text_masking"]) == (
        "pretraining",
        0.25,
        "token",
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "pretrainin"},
            r"task\.name='pretrainin': the module beit3_ds\.tasks\.pretrainin has no task .*pretraining",
        ),
        ({"name": "os.path"}, r"task\.name='os\.path': the module os\.path has no task"),
        ({"name": "no.such.module"}, r"task\.name='no\.such\.module'"),
        ({"name": 3}, r"beit3_ds\.task\.name: expected the name of a task, such as 'pretraining', got"),
        ([], r"beit3_ds\.task: expected a JSON object"),
        ({"image_mask_rati": 0.4}, r"beit3_ds\.task: unknown key 'image_mask_rati'.*'image_mask_ratio'"),
        ({"name": "tests.tasks.rotation", "angle": 3}, r"beit3_ds\.task: unknown key 'angle'"),
        ({"image_mask_ratio": 1.5}, r"image_mask_ratio is 1\.5; it must be between"),
    ],
)
def test_mistakes_are_named(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(section)
    assert "\n" not in str(caught.value)


def test_a_word_table_without_a_head_for_words_is_refused() -> None:
    # The first stage of a pipeline would send the table to a head that never receives it.
    assert build(tie_word_embeddings=True).config.model.has_tied_embedding
    with pytest.raises(ConfigError, match=r"tests\.tasks\.rotation has no head that predicts words\. Set it to false"):
        build({"name": "tests.tasks.rotation"}, tie_word_embeddings=True)

"""Tests that the error for an old key names the new key, and that the documentation lists every renamed key."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.config.renamed_keys import MOVED_KEYS, RENAMED_KEYS, TOKENIZER_KEYS, with_new_keys
from beit3_ds.config.strict import check_known_keys

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"data: .*'{old}'.*'{new}'"):
        check_known_keys({old: 1}, [new, "other"], "data")


def test_a_saved_config_gets_the_new_keys_at_every_depth() -> None:
    old = {"data": {"prepared_dir": "x", "pairs": [{"heldout": []}]}, "initial_weights": None}
    assert with_new_keys(old) == {"data": {"cache_dir": "x", "pairs": [{"validation": []}]}, "init_from": None}


def test_a_saved_config_gets_its_moved_keys() -> None:
    old = {"data": {"text_masking": "token", "seed": 1}, "training": {"loss_weights": {"pair_mim": 2.0}}}
    task = {"name": "pretraining", "text_masking": "token", "loss_weights": {"pair_mim": 2.0}}
    assert with_new_keys(old) == {"data": {"seed": 1}, "training": {}, "task": task}


@pytest.mark.parametrize(("key", "section"), MOVED_KEYS.items())
def test_a_key_in_its_old_section_names_the_new_one(key: str, section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}: the key '{key}' .* task\.{key}"):
        check_known_keys({key: 1}, ["other"], section)


def test_a_saved_config_loses_the_keys_of_the_tokenizers_training() -> None:
    old = {"tokenizers": {"visual": {"path": "v", "batch_size": 8, "teacher": "t"}, "text": {"path": "t"}}}
    assert with_new_keys(old) == {"tokenizers": {"visual": {"path": "v"}, "text": {"path": "t"}}}


@pytest.mark.parametrize(("key", "place"), TOKENIZER_KEYS.items())
def test_a_key_of_the_tokenizers_training_names_its_place(key: str, place: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{key}' belongs to the tokenizer's training.*set {place} in that run"):
        check_known_keys({key: 1}, ["path"], "beit3_ds.tokenizers.visual")
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        check_known_keys({key: 1}, ["path"], "beit3_ds.parallel")


def test_the_documentation_lists_every_renamed_key() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for old, new in RENAMED_KEYS.items():
        assert f"| `{old}` | `{new}` |" in lines
    for key, section in MOVED_KEYS.items():
        assert f"| `{section}.{key}` | `task.{key}` |" in lines
    for key, place in TOKENIZER_KEYS.items():
        assert f"| `tokenizers.visual.{key}` | `{place}` of the tokenizer's own run |" in lines

"""Tests that an old key's error names the new key, and that the documentation lists every renamed key."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.config.renamed_keys import RENAMED_KEYS, with_new_keys
from beit3_ds.config.strict import check_known_keys

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"data: .*'{old}'.*'{new}'"):
        check_known_keys({old: 1}, [new, "other"], "data")


def test_a_saved_config_gets_the_new_keys_at_every_depth() -> None:
    old = {"data": {"prepared_dir": "x", "pairs": [{"heldout": []}]}, "initial_weights": None}
    assert with_new_keys(old) == {"data": {"cache_dir": "x", "pairs": [{"validation": []}]}, "init_from": None}


def test_the_documentation_lists_every_renamed_key() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for old, new in RENAMED_KEYS.items():
        assert f"| `{old}` | `{new}` |" in lines

"""Tests reading of lists in JSON files of any size, one element at a time."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit3_ds.data.files import json_lists
from beit3_ds.data.files.json_lists import iterate_json_list, read_json_members

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    elements=st.lists(VALUES, max_size=4),
    others=st.dictionaries(st.text(max_size=4).filter(lambda key: key != "wanted"), VALUES, max_size=3),
    chunk=st.sampled_from([1, 7, 1 << 20]),
    indent=st.sampled_from([None, 2]),
)
def test_equals_json(
    elements: list[object], others: dict[str, object], chunk: int, indent: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    content = {**others, "wanted": elements, "z": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "_CHUNK", chunk)  # catches an element lost where the stream is cut, as 12 of 123
        path.write_text(json.dumps(content, indent=indent))
        assert list(iterate_json_list(str(path), "wanted")) == elements
        assert read_json_members(str(path), "wanted", "z", "absent") == {"wanted": elements, "z": 1}
        path.write_text("\ufeff" + json.dumps(elements, indent=indent), encoding="utf-8")
        assert list(iterate_json_list(str(path))) == elements


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"wanted": [1, 2', "truncated"),
        ('{"wanted": [{"a": ', "truncated or damaged"),
        ('{"wanted": {"a": 1}}', "expected '\\['"),
        ("[1]", "expected '{'"),
        ('{"wanted" [1]}', "expected ':'"),
        ("{1: [1]}", "key 1"),
        ("", "truncated"),
    ],
)
def test_damaged_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(iterate_json_list(str(tmp_path / "file.json"), "wanted"))


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"other": []}')
    with pytest.raises(KeyError, match="wanted"):
        list(iterate_json_list(str(tmp_path / "file.json"), "wanted"))

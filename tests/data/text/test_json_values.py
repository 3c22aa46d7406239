"""Tests that JSON values are yielded one by one, wherever reads divide the file."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.text import json_values
from beit3_ds.data.text.json_values import iterate_json_values

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 9))
def test_a_list_is_its_elements(values: list[Any], indent: int | None, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_CHUNK", chunk)  # catches a number that is yielded before its last digit is read
        assert list(iterate_json_values(io.StringIO(json.dumps(values, indent=indent)), 10**6)) == values


@pytest.mark.parametrize(
    "text", ['{"a": 1}{"b": 2}', '{"a": 1}\n{"b": 2}\n', '[{"a": 1}]\n[{"b": 2}]', '[{"a": 1}]{"b": 2}']
)
def test_values_and_lists_may_follow_each_other(text: str) -> None:
    assert list(iterate_json_values(io.StringIO(text), 100)) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', "truncated within a list"),
        ('[{"a": 1}, {"b"', "not JSON"),
        ("[nothing]", "not JSON"),
        ("[" * 100_000, "not JSON|truncated"),
        ('["' + "x" * 99 + '"]', "a value of more than 50 characters"),
    ],
)
def test_damage_is_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_CHUNK", 16)
    with pytest.raises(ValueError, match=message):
        list(iterate_json_values(io.StringIO(text), 50))

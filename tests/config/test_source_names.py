"""Tests that short names of sources are readable, distinct and valid as file names."""

import re

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import short_source_names


def test_names_are_the_ends_of_paths() -> None:
    paths = ["data/coco/val-*.tar", "data/wiki/val.txt.gz", "data/books/val.txt.gz", "/mnt/sbu", "x.jsonl"]
    assert short_source_names(paths) == ["coco_val", "wiki_val", "books_val", "sbu", "x"]
    assert short_source_names(["a/b.tar", "a/b.tar", "*"]) == ["a_b", "a_b_2", "source"]


@given(
    st.lists(
        st.text(min_size=1, max_size=60) | st.sampled_from(["a/b.tar", "c/b.tar", "b.tar", "*", "///"]), max_size=6
    )
)
def test_names_differ_and_fit_file_names(paths: list[str]) -> None:
    names = short_source_names(paths)
    assert len(names) == len(paths) == len(set(names))
    assert all(re.fullmatch(r"[A-Za-z0-9._]{1,45}", name) for name in names)

"""Tests lists of classes."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.tasks.imagenet.classes import ClassList, ImageClass


def test_lines_of_keys_and_names(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("n01440764 tench, Tinca tinca\n\nn02012849 crane\nn03126707 crane\n")
    classes = ClassList.load(str(path))
    assert classes.names == ("tench, Tinca tinca", "crane", "crane") and classes.labels["n03126707"] == 2
    assert classes.label("n02012849", "x") == 1
    with pytest.raises(
        ConfigError, match=r"a\.png is of the class 'n02012848'.*3 classes of .*Did you mean 'n02012849'"
    ):
        classes.label("n02012848", "a.png")


def test_the_digest_depends_on_everything() -> None:
    tench, crane = ImageClass("n1", "tench"), ImageClass("n2", "crane")
    lists = (
        [tench, crane],
        [crane, tench],
        [tench],
        [tench, ImageClass("n2", "bird")],
        [tench, ImageClass("n3", "crane")],
    )
    assert len({ClassList(classes).digest() for classes in lists}) == 5
    assert ClassList(lists[0]).digest() == ClassList(lists[0], "elsewhere").digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no classes"),
        ("n1 tench\nn2\n", r"classes\.txt:2 is 'n2'"),
        ("n1 a\nn1 b", "the class 'n1' occurs twice, as 0 and 1"),
    ],
)
def test_wrong_lists_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ClassList.load(str(tmp_path / "classes.txt"))
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read"):
        ClassList.load(str(tmp_path / "none.txt"))

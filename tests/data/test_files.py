"""Patterns: what braces, home folders and stars name, in an order that follows from the names alone."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.files import expand_braces, expand_patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{0008..0011}.tar", ["s-0008.tar", "s-0009.tar", "s-0010.tar", "s-0011.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),  # catches a width without leading zeros
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{a,b{1,2}}", ["xa", "xb1", "xb2"]),
        ("{a,}b", ["ab", "b"]),
        ("{a}-{}-{1..}", ["{a}-{}-{1..}"]),  # no braces of a shell: names of files
        ("plain", ["plain"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(expected)


def test_patterns_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["s-0000.tar", "s-0001.tar", "s-0002.tar", "t-0.tar", "a{0,1}.tar", "deep/er/u.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))

    def expand(*patterns: str) -> list[str]:
        return [str(Path(path).relative_to(tmp_path)) for path in expand_patterns(patterns)]

    assert expand("~/s-{0000..0002}.tar") == names[:3]
    assert expand(f"{tmp_path}/{{t-*,s-000?}}.tar") == [names[3], *names[:3]]
    assert expand(f"{tmp_path}/a{{0,1}}.tar") == ["a{0,1}.tar"]  # a name that exists
    assert expand("~/**/*.tar") == sorted(names)
    assert expand("~/deep/**") == ["deep/er/u.tar"]
    with pytest.raises(ConfigError, match=r"no file matches '.*/s-0003\.tar', which is part of '~/s-\{0001\.\.0003\}"):
        expand("~/s-{0001..0003}.tar")  # catches a shard of the range that is missing without a word
    with pytest.raises(ConfigError, match=r"matches the folder .*/deep\. Match files"):
        expand("~/*")  # catches files in a folder that are left out without a word
    with pytest.raises(ConfigError, match="more than 1,000,000 numbers"):
        expand("~/{0..99999999}.tar")

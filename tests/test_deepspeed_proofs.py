"""Tests that proofs are skipped only while nothing that they depend on has changed."""

import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import deepspeed_proofs
from tests.deepspeed_proofs import PACKAGES, current_digest, digest, is_proved, read_record, record_outcome

VERSIONS = {name: version(name) for name in PACKAGES}
SOURCE = '"""Words."""\n\ndef f(x):\n    """Words."""\n    return x + 1  # words\n'


def test_the_digest_is_of_code_and_versions() -> None:
    now = digest([SOURCE], VERSIONS)
    assert digest([SOURCE.replace("ords", "hat else").replace("  #", " #")], VERSIONS) == now
    # catches a digest that a change slips through
    assert digest([SOURCE.replace("+ 1", "+ 2")], VERSIONS) != now
    assert digest([SOURCE, ""], VERSIONS) != now
    for name in PACKAGES:
        assert digest([SOURCE], VERSIONS | {name: "0"}) != now


SOURCES = (*deepspeed_proofs.WORKAROUNDS, *deepspeed_proofs.HARNESS)


@pytest.mark.parametrize("name", [*SOURCES, "test_file"])
def test_every_source_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that each named file or class exists and changes the digest."""
    for source in SOURCES:
        file = source.partition("::")[0]
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(deepspeed_proofs.ROOT / file, tmp_path / file)
    (tmp_path / "test_file").write_text(SOURCE)
    monkeypatch.setattr(deepspeed_proofs, "ROOT", tmp_path)
    before = current_digest(tmp_path / "test_file")
    name, _, part = name.partition("::")
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(f"{text}\nchanged = 1\n")
    assert (current_digest(tmp_path / "test_file") != before) == (not part)
    if part:  # of this file only the class counts
        changed, count = re.subn(rf"(?m)^class {part}.*:$", r"\g<0>\n    changed = 1", text)
        assert count == 1
        (tmp_path / name).write_text(changed)
        assert current_digest(tmp_path / "test_file") != before


def test_a_proof_that_passed_is_skipped_until_something_changes(tmp_path: Path) -> None:
    file = tmp_path / "test_file.py"
    file.write_text(SOURCE)
    assert read_record(file) == {}
    record_outcome(file, "test_a", passed=True)
    record_outcome(file, "test_b[1]", passed=True)
    now = current_digest(file)
    assert is_proved("folder/test_file.py::test_b[1]", read_record(file), now)
    assert not is_proved("folder/test_file.py::test_c", read_record(file), now)
    record_outcome(file, "test_a", passed=False)
    assert not is_proved("folder/test_file.py::test_a", read_record(file), now)

    file.write_text(SOURCE.replace("+ 1", "+ 2"))
    assert not is_proved("folder/test_file.py::test_b[1]", read_record(file), current_digest(file))
    record_outcome(file, "test_a", passed=True)
    assert set(read_record(file)) == {"test_a"}


def test_recorded_proofs_are_those_that_exist() -> None:
    """Catches the record of a renamed or deleted proof; a renamed proof would run each time."""
    file = deepspeed_proofs.ROOT / "tests/pipeline/test_deepspeed_compat.py"
    text = file.read_text()
    for name in read_record(file):
        assert f"@pytest.mark.deepspeed_proof\ndef {name.partition('[')[0]}(" in text

"""Tests that foreign files beside checkpoints are left alone and do not disturb saving or resuming."""

import hashlib
import os
import re
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from beit3_ds.checkpoint.folder import best_checkpoint_path, checkpoint_name, checkpoint_paths, open_checkpoint
from beit3_ds.checkpoint.index import BEST
from beit3_ds.config import ConfigError
from tests.checkpoint.small_state import SmallRun, check_holds

KINDS = ("copy", "half-written", "empty folder", "file", "link to a checkpoint", "link to nothing", "notes inside")


def names() -> st.SearchStrategy[str]:
    """Generates names similar to those of checkpoints, as made by people, editors and synchronising programs."""
    step = st.integers(0, 12).map(checkpoint_name)
    endings = [".bak", "~", " (1)", "-old", ".tar", ".part", "_", ".replaced", "0", "\n", "\u0663", ".writing"]
    decorated = st.tuples(
        st.sampled_from(["", "", ".", "old-", "copy of ", ".writing-", ".deleted-", "~"]),
        step,
        st.sampled_from(endings),
    ).map("".join)
    other = st.sampled_from(
        ["step-1", "step-", "step-abc", "step-+0000001", "Step-00000001", "step-0000000\u0661", "best"]
    )
    free = st.text(st.sampled_from(string.ascii_letters + string.digits + "-_. "), min_size=1, max_size=20)
    return st.one_of(decorated, other, free.filter(lambda name: name.strip(". ") and name != "latest"))


def place(root: Path, name: str, kind: str, outside: Path) -> Path:
    """Creates a file or folder of another program beside the checkpoints."""
    path = root / name
    if kind == "file":
        path.write_text("mine")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(outside / "absent")
    elif kind == "link to a checkpoint":
        path.symlink_to(outside)
    else:
        shutil.copytree(outside, path)
        if kind == "half-written":
            (path / "index.json").unlink()
        elif kind == "notes inside":
            (path / "notes.txt").write_text("the best one so far")
    return path


def content(path: Path) -> str:
    """Returns a digest of names and content below a path, without following links."""
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return str([(child.name, content(child)) for child in sorted(path.iterdir())])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.tuples(names(), st.sampled_from(KINDS)), min_size=1, max_size=4, unique_by=lambda x: x[0]))
@example(items=[("step-00000002.bak", "copy")])
@example(items=[("step-00000099.bak", "copy"), ("step-00000000~", "half-written")])
@example(items=[(".writing-step-00000003", "notes inside"), (".deleted-step-00000001.bak", "copy")])
def test_names_that_are_not_ours_are_left_alone(lone_rank: None, items: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, outside = Path(folder) / "checkpoints", Path(folder) / "elsewhere"
        run = SmallRun(root, keep=1)
        assert run.save(2) == [None]
        shutil.copytree(root / checkpoint_name(2), outside)
        placed = [place(root, name, kind, outside) for name, kind in items if not _is_ours(name, kind)]
        before = {path: content(path) for path in placed} | {outside: content(outside)}
        errors = run.save(3, 4, 5)
        for step, error in zip((3, 4, 5), errors, strict=True):
            if any(path.name == f".writing-{checkpoint_name(step)}" for path in placed):
                assert error is not None and "did not write; move it" in error
                assume(step < 5)
            else:
                assert error is None
        for path, digest in before.items():
            assert content(path) == digest, f"{path.name} was changed"
        assert SmallRun(root).resume() == 5
        assert run.store.newest_path() == root / checkpoint_name(5)
        assert open_checkpoint(root).step == 5
        assert checkpoint_paths(root) == [root / checkpoint_name(5)]  # those of before are pruned all the same


def _is_ours(name: str, kind: str) -> bool:
    """Returns whether a killed save could have left this entry, so that the next save deletes it."""
    exact = re.fullmatch(r"\.(writing|deleted)-step-([0-9]{8}|[1-9][0-9]{8,})", name) is not None
    return exact and kind in ("copy", "half-written", "empty folder")


@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoints_name_alone_makes_nothing_ours(tmp_path: Path, kind: str) -> None:
    """Checks that foreign content with the name of a checkpoint is never loaded, deleted or overwritten."""
    root, outside = tmp_path / "checkpoints", tmp_path / "elsewhere"
    run = SmallRun(root, keep=1)
    assert run.save(2) == [None]
    shutil.copytree(root / checkpoint_name(2), outside)
    placed = [place(root, checkpoint_name(step), kind, outside) for step in (1, 4, 9)]
    before = [content(path) for path in placed]
    assert SmallRun(root).resume() == 2
    assert SmallRun(root).store.newest_path() == root / checkpoint_name(2)
    assert run.save(3, 4, 5) == [None] * 3  # step 4's place is taken: what is there is moved aside
    placed[1] = root / f"{checkpoint_name(4)}.replaced"
    assert [content(path) for path in placed] == before
    assert SmallRun(root).resume() == 5
    check_holds(root / checkpoint_name(5), 5)


@pytest.mark.usefixtures("lone_rank")
def test_a_checkpoint_with_notes_is_kept(tmp_path: Path) -> None:
    """Catches the deletion of a checkpoint to which a person has added a file."""
    run = SmallRun(tmp_path / "c", keep=1)
    assert run.save(1) == [None]
    (tmp_path / "c" / checkpoint_name(1) / "notes.txt").write_text("the best one so far")
    assert run.save(2, 3) == [None, None]
    assert [path.name for path in checkpoint_paths(tmp_path / "c")] == [checkpoint_name(3), checkpoint_name(1)]


@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_somebody_elses_latest_is_left_alone(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "c"
    root.mkdir()
    if kind == "link":
        (root / "latest").symlink_to("step-00000001")
    else:
        (root / "latest").mkdir()
    before = content(root / "latest")
    run = SmallRun(root)
    assert run.save(1, 2) == [None, None]
    assert content(root / "latest") == before and SmallRun(root).resume() == 2
    assert "latest is not a file of this program" in capsys.readouterr().out


@pytest.mark.usefixtures("lone_rank")
def test_the_search_sorts_by_number(tmp_path: Path) -> None:
    """Checks that step numbers are sorted as numbers: as names, nine digits would come before eight."""
    root = tmp_path / "c"
    assert SmallRun(root, keep=5).save(99_999_999, 100_000_000) == [None, None]
    assert SmallRun(root).resume() == 100_000_000
    assert open_checkpoint(root).step == 100_000_000


def best_at(step: int) -> dict[str, Any]:
    return {"step": step, "metric": "accuracy", "value": 0.5, "evaluations_since": 0}


@pytest.mark.usefixtures("lone_rank")
def test_pruning_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, keep=2)
    for step in range(1, 7):
        run.store.save(run.state.train_to(step), step, {BEST: best_at(2 if step < 6 else 6)})
        run.store.finish()
        if step == 5:
            assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["2", "4", "5"]
            assert best_checkpoint_path(tmp_path).name == "step-00000002"
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["4", "5", "6"]  # two newest and the best one
    (tmp_path / "other").mkdir()
    assert SmallRun(tmp_path / "other").save(1) == [None]
    with pytest.raises(ConfigError, match=r"had no training\.best_metric"):
        best_checkpoint_path(tmp_path / "other")

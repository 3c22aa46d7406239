"""Tests that damaged, mixed-up and forged checkpoints are skipped or refused, and never loaded in part."""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from beit3_ds.checkpoint.collection import has_checkpoints
from beit3_ds.checkpoint.index import INDEX_NAME, PIECES_FILE
from beit3_ds.config import ConfigError
from beit3_ds.parallel import Mesh
from tests.checkpoint.saved_steps import BEFORE, FILES, NEWEST, edit_index, folder
from tests.checkpoint.small_state import SmallRun
from tests.ranks import run_ranks


def check_passed_over(root: Path, capsys: pytest.CaptureFixture[str], reason: str = "") -> None:
    """Checks that a new process resumes from the previous checkpoint, and prints why it skipped the newest."""
    capsys.readouterr()
    assert SmallRun(root).resume() == BEFORE
    output = capsys.readouterr().out
    assert f"checkpoint {folder(root)} is not whole (" in output
    assert reason in output


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_found(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Flips single bits at random places of a file, and at every byte of the index."""
    path = folder(root) / name
    content, draw = path.read_bytes(), random.Random(0)
    places = range(len(content)) if name == INDEX_NAME else draw.sample(range(len(content)), 60)
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        check_passed_over(root, capsys)
    path.write_bytes(content)
    assert SmallRun(root).resume() == NEWEST


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero_the_end(path: Path) -> None:
    """Zeroes the end of a file, as if its last blocks had never been written."""
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes(100))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, Path.unlink, zero_the_end, make_folder, empty])
def test_damaged_files_are_found(
    root: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], Any]
) -> None:
    damage(folder(root) / name)
    check_passed_over(root, capsys, name)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("name", [name for name in FILES if name != PIECES_FILE])  # these are equal
def test_files_swapped_between_checkpoints_are_found(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Checks two whole files of equal size that were swapped; only digests can reveal the swap.

    Neither checkpoint may be loaded.
    """
    swap(folder(root) / name, folder(root, BEFORE) / name)
    with pytest.raises(ConfigError, match=r"none of the checkpoints in .* can be used") as refusal:
        SmallRun(root).resume()
    assert capsys.readouterr().out.count("is not whole (") == 2
    reason = "it holds step 5" if name == INDEX_NAME else f"{name} was changed: its digest is another"
    assert f"{folder(root).name}: {reason}; {folder(root, BEFORE).name}: " in str(refusal.value)


def make_newer(path: Path) -> None:
    """Rewrites an index as a later version of this program might write it."""
    content = json.loads(path.read_text())
    content["version"] += 1
    content["versions"]["beit3_ds"] = "9.1.0"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (make_newer, "which needs beit3_ds '9.1.0'"),
        (empty, "no readable index.json"),
        (Path.unlink, "index.json is missing"),
        (make_folder, "index.json"),
    ],
)
def test_no_run_begins_anew_while_checkpoints_exist(root: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    """Checks the error if no checkpoint is usable: it gives each reason and the remedies, and nothing is changed."""
    for step in (BEFORE, NEWEST):
        spoil(folder(root, step) / INDEX_NAME)
    before = sorted(path.name for path in root.rglob("*"))
    with pytest.raises(ConfigError, match=r"none of the checkpoints in .* can be used") as refusal:
        SmallRun(root).resume()
    message = str(refusal.value)
    assert message.count(reason) >= 2
    assert "to begin anew at step 0, rename that folder or set another training.output_dir" in message
    assert sorted(path.name for path in root.rglob("*")) == before


def test_unreadable_folder_is_no_empty_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a file system that has lost its server; the folder must not count as empty."""

    def fail(path: Path) -> Any:
        raise OSError(5, os.strerror(5), str(path))

    monkeypatch.setattr("beit3_ds.checkpoint.folder.os.scandir", fail)
    with pytest.raises(ConfigError, match=r"checkpoints in .* cannot be read: Input/output error"):
        SmallRun(root).resume()


def test_files_swapped_in_a_checkpoint_are_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swap(folder(root) / FILES[0], folder(root) / FILES[1])
    check_passed_over(root, capsys)


def test_lost_target_of_a_link_is_no_new_run(root: Path) -> None:
    """Catches a run that starts from the beginning because the disk with its checkpoints is not mounted."""
    root.rename(root.with_name("elsewhere"))
    root.symlink_to(root.with_name("not-mounted"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        SmallRun(root).resume()
    assert has_checkpoints(root.parent)


def swap_those_of_two_ranks(newest: Path) -> None:
    swap(newest / "weights-00000.safetensors", newest / "weights-00001.safetensors")


def damage_what_the_second_rank_reads(newest: Path) -> None:
    zero_the_end(newest / "moments-00001.safetensors")


def damage_and_resume(root: str, damage: Callable[[Path], None]) -> int | None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    run = SmallRun(Path(root), mesh=Mesh(data_parallel_rank=rank, data_parallel_size=2))
    run.save(BEFORE, NEWEST)
    if rank == 0:
        damage(folder(Path(root)))
    dist.barrier()
    step = run.resume()
    dist.destroy_process_group()
    return step


@pytest.mark.parametrize("damage", [swap_those_of_two_ranks, damage_what_the_second_rank_reads])
def test_ranks_agree_on_damage(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Catches a rank that accepts a damaged checkpoint because its own files are whole."""
    assert run_ranks(damage_and_resume, 2, str(tmp_path / "checkpoints"), damage) == [BEFORE, BEFORE]


def test_checkpoint_under_another_step_is_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks a whole checkpoint that was renamed to another step."""
    shutil.rmtree(folder(root))
    shutil.copytree(folder(root, BEFORE), folder(root))
    check_passed_over(root, capsys, f"holds step {BEFORE}")


def leave_out_a_piece(content: dict[str, Any]) -> None:
    content["tensors"]["norm.weight"]["pieces"] = 0


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "step": lambda content: content.update(step=9),
    "optimizer step": lambda content: content.update(optimizer_step=1),
    "model": lambda content: content["model"].update(hidden_size=4),
    "file left out": lambda content: content["files"].popitem(),
    "piece left out": leave_out_a_piece,
    "version": lambda content: content.update(version=3),
    "format": lambda content: content.update(format="another"),
    "no tensors": lambda content: content.pop("tensors"),
    "no version": lambda content: content.pop("version"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_index_is_found(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    edit_index(root, EDITS[name], with_digest=False)
    check_passed_over(root, capsys, INDEX_NAME)


@pytest.mark.parametrize("name", ["piece left out", "version", "format", "no tensors", "no version", "step"])
def test_index_that_makes_no_sense_is_found(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Checks an index with contradictory content but a valid digest, as a faulty version might write."""
    edit_index(root, EDITS[name], with_digest=True)
    check_passed_over(root, capsys)


@pytest.mark.parametrize("content", [b"[1]", b"1", b"null", b"[" * 100_000, b"\xff\xfe", b'{"sha256": 1}'])
def test_other_content_in_place_of_the_index_is_found(
    root: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (folder(root) / INDEX_NAME).write_bytes(content)
    check_passed_over(root, capsys, INDEX_NAME)


class Bomb:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def pickled(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb))


def saved_by_torch(path: Path, bomb: Bomb) -> None:
    torch.save({"weights": bomb}, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", [pickled, saved_by_torch])
def test_pickle_is_never_opened(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    put: Callable[[Path, Bomb], None],
) -> None:
    path, trace = folder(root) / name, tmp_path / "unpickled"
    size = path.stat().st_size
    put(path, Bomb(trace))
    check_passed_over(root, capsys, name)
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))  # of the right size, too
    check_passed_over(root, capsys, name)
    assert not trace.exists()


def forge(root: Path, name: str) -> None:
    """Updates size and digest in the index for a changed file."""
    written = (folder(root) / name).read_bytes()
    fitting = [len(written), hashlib.sha256(written).hexdigest()]
    edit_index(root, lambda content: content["files"].update({name: fitting}), with_digest=True)


@pytest.mark.parametrize("put", [pickled, saved_by_torch])
def test_forged_pickle_is_an_error(root: Path, tmp_path: Path, put: Callable[[Path, Bomb], None]) -> None:
    """Checks that a forged pickle with valid digests is an error, without trying another checkpoint.

    Only a person could have made the digests fit.
    """
    put(folder(root) / FILES[1], Bomb(tmp_path / "unpickled"))
    forge(root, FILES[1])
    with pytest.raises(ConfigError, match=r"moments-00000\.safetensors.* is not a whole safetensors file"):
        SmallRun(root).resume()
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("change", ["name", "dtype", "cut"])
def test_forged_tensors_are_an_error(root: Path, change: str) -> None:
    """Checks tensor files that lack a tensor, hold one of another dtype, or end inside a tensor."""
    path = folder(root) / FILES[0]
    tensors = safetensors.torch.load_file(path)
    key = next(key for key in tensors if key.startswith("norm.weight"))
    if change == "name":
        tensors["other"] = tensors.pop(key)
    elif change == "dtype":
        tensors[key] = tensors[key].to(torch.int32)
    safetensors.torch.save_file(tensors, path)
    if change == "cut":
        os.truncate(path, path.stat().st_size - 30)
    forge(root, FILES[0])
    with pytest.raises(ConfigError, match=r"step-00000006 .*weights-00000\.safetensors"):
        SmallRun(root).resume()


def test_torn_files_are_seen_without_reading_them(root: Path) -> None:
    """Catches messages and pruning that treat a checkpoint with a truncated file as whole."""
    truncate(folder(root) / FILES[0])
    assert SmallRun(root).store.newest_path() == folder(root, BEFORE)


def test_damaged_checkpoint_is_replaced(root: Path) -> None:
    """Checks that a new save replaces a damaged checkpoint, and that the previous checkpoint is then pruned."""
    zero_the_end(folder(root) / FILES[0])
    run = SmallRun(root, keep=1)
    assert run.resume() == BEFORE
    assert run.save(NEWEST) == [None]
    assert list(root.glob("step-*")) == [folder(root)]
    assert SmallRun(root).resume() == NEWEST


@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoint_does_not_push_out_whole_ones(tmp_path: Path, keep: int) -> None:
    """Checks a run that resumes from a checkpoint older than a damaged one, whose files have valid sizes.

    Catches pruning that counts the damaged checkpoint, which has the highest step, and deletes the one just saved.
    """
    root = tmp_path / "checkpoints"
    assert SmallRun(root, keep + 1).save(1, *range(BEFORE - keep + 1, BEFORE + 1)) == [None] * (keep + 1)
    for step in range(BEFORE - keep + 1, BEFORE + 1):
        zero_the_end(folder(root, step) / FILES[0])
    run = SmallRun(root, keep)
    assert run.resume() == 1
    for step in range(2, BEFORE + 2):
        assert run.save(step) == [None]
        assert run.store.newest_path() == folder(root, step)
        assert (root / "latest").read_text().strip() == folder(root, step).name
        assert SmallRun(root, keep).resume() == step
    assert len(list(root.glob("step-*"))) == keep

"""Tests that each CSV file of a resumed run is a single table, even if the disk fails at any moment."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.training.csv_monitor import CsvMonitor
from tests.retrying.failing_disk import MOMENTS, failing_disk


def start(folder: Path, step: int) -> CsvMonitor:
    """Returns the monitor of a new process that resumes after `step` updates."""
    monitor = CsvMonitor(folder / "csv", lambda line: None)
    monitor.forget_after(step)
    return monitor


def test_a_resumed_run_adds_rows_to_the_same_table(tmp_path: Path) -> None:
    """Catches a second header, and repeated rows of steps after the checkpoint; DeepSpeed's monitor writes both."""
    first = start(tmp_path, -1)
    first.write_events([("train/loss", 5.0 - step, step) for step in (1, 2, 3)])
    resumed = start(tmp_path, 2)
    resumed.write_events([("train/loss", 2.5, 3), ("validation/loss", 2.0, 3)])
    assert (tmp_path / "csv" / "train_loss.csv").read_text().split() == ["step,loss", "1,4.0", "2,3.0", "3,2.5"]
    assert (tmp_path / "csv" / "validation_loss.csv").read_text().split() == ["step,loss", "3,2.0"]
    new_run = start(tmp_path, -1)
    new_run.write_events([("train/loss", 6.0, 1)])
    assert (tmp_path / "csv" / "train_loss.csv").read_text().split() == ["step,loss", "1,6.0"]


def test_files_cut_by_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "train_loss.csv").write_text("step,loss\r\n1,4.0\r\n2,")
    (folder / "empty.csv").write_text("")
    start(tmp_path, 1)
    assert (folder / "train_loss.csv").read_text().split() == ["step,loss", "1,4.0"]
    assert (folder / "empty.csv").read_text().split() == ["step,empty"]


def test_tables_of_others_stay(tmp_path: Path) -> None:
    """Catches a resumed run that deletes rows of a user's table, or fails on a file that it did not write."""
    folder = tmp_path / "csv"
    (folder / "folder.csv").mkdir(parents=True)
    contents = {
        "notes.csv": b"step,remark\r\n9,lowered the rate\r\nlater,look at it\r\n",
        "steps.csv": b"step,loss,remark\r\n9,1.0,by hand\r\n",
        "latin.csv": "step,latin\r\n9,gr\u00f6\u00dfer\r\n".encode("latin-1"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    resumed = start(tmp_path, 1)
    resumed.write_events([("train/loss", 2.5, 2)])
    assert {name: (folder / name).read_bytes() for name in contents} == contents
    assert (folder / "train_loss.csv").read_text().split() == ["step,loss", "2,2.5"]


NAMES = st.sampled_from(["train/loss", "train/image mim", "validation/loss"])


@given(events=st.lists(st.tuples(NAMES, st.floats(allow_nan=False)), max_size=20), moments=MOMENTS)
def test_a_disk_that_fails_changes_no_table(events: list[tuple[str, float]], moments: list[int | None]) -> None:
    """Catches a missing or repeated header, and rows that are torn, lost or repeated."""
    with TemporaryDirectory() as folder:
        contents = []
        for name, failures in (("undisturbed", []), ("disturbed", moments)):
            said: list[str] = []
            monitor = CsvMonitor(Path(folder) / name, said.append)
            monitor.forget_after(-1)
            with failing_disk(failures):
                for step, (event, value) in enumerate(events):
                    monitor.write_events([(event, value, step)])
            assert monitor.retry()
            assert [line.startswith("WARNING") for line in said] == [number % 2 == 0 for number in range(len(said))]
            contents.append({path.name: path.read_bytes() for path in (Path(folder) / name).glob("*")})
        assert contents[0] == contents[1]


def test_names_of_deepspeed(tmp_path: Path) -> None:
    """Catches file names and formats that differ from those of DeepSpeed's monitor."""
    monitor = start(tmp_path, -1)
    monitor.write_events([("Train/Samples/train loss", 0.5, 8)])
    path = tmp_path / "csv" / "Train_Samples_train_loss.csv"
    assert path.read_bytes() == b"step,train loss\r\n8,0.5\r\n"
    start(tmp_path, 8).write_events([("Train/Samples/train loss", 0.25, 9)])
    assert path.read_bytes() == b"step,train loss\r\n8,0.5\r\n9,0.25\r\n"


def test_a_table_without_new_rows_is_completed_too(tmp_path: Path) -> None:
    """Catches rows of an evaluation that stay unwritten until the next one although the disk has room."""
    monitor = start(tmp_path, -1)
    with failing_disk([0]):
        monitor.write_events([("validation/loss", 2.0, 0)])
    monitor.write_events([("train/loss", 2.5, 1)])
    assert (tmp_path / "csv" / "validation_loss.csv").read_text().split() == ["step,loss", "0,2.0"]

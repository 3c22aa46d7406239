"""Tests runs whose data workers are killed or stopped, or hang while reading.

The cause must be named, and no step may be lost.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3_ds.checkpoint.folder import CheckpointFolder
from tests.checkpoint.test_stopping import others
from tests.checkpoint.training_run import TrainingRun, check_same_state
from tests.preloaded import start_module
from tests.test_train import losses, write

BOUND_SECONDS = 150
SETTINGS = {"total_steps": 12, "save_interval": 1000, "eval_interval": 1000}


def workers(run: TrainingRun) -> list[int]:
    """Returns the ids of the only rank's reading workers, which have more threads than their fork server."""
    found = []
    for pid in others(run):
        if "forkserver" in Path(f"/proc/{pid}/cmdline").read_text() and len(os.listdir(f"/proc/{pid}/task")) > 1:
            found.append(pid)
    return found


@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_lost_worker_changes_nothing(run_mapping: dict[str, Any], tmp_path: Path, blow: signal.Signals) -> None:
    """Catches a main process that waits forever, and a step that is skipped, repeated or read differently."""
    run_mapping["beit3_ds"]["data"] |= {"num_workers": 2, "prefetch_steps": 1, "timeout_seconds": 60}
    undisturbed = TrainingRun(run_mapping, tmp_path / "undisturbed", **SETTINGS)
    assert undisturbed.finish() == [0]
    run = TrainingRun(run_mapping, tmp_path / "disturbed", **SETTINGS)
    with run.started():
        run.wait_until(lambda: "step 2/12" in run.output())
        for pid in workers(run):
            os.kill(pid, blow)
        assert run.wait() == [0]
    assert "WARNING: rank 0 (stage 0, data-parallel rank 0, tensor-parallel rank 0, host" in run.output()
    how = r"pid \d+ died of SIGKILL" if blow == signal.SIGKILL else r"stopped for 1\d s \(pid"
    assert re.search(rf"lost data worker \d, which prepares step \d+: {how}", run.output()), run.output()
    check_same_state(run.checkpoint(12), undisturbed.checkpoint(12))
    assert losses(run.output_dir) == losses(undisturbed.output_dir)


HANGING_READS = """
import os, time
_open = os.open
def open_or_hang(path, *arguments, **options):
    folder = os.environ["HANGING_FOLDER"]
    if os.fsdecode(path).startswith(folder + os.sep) and os.path.exists(folder + ".hangs"):
        time.sleep(10_000)
    return _open(path, *arguments, **options)
os.open = open_or_hang
"""


class HungRun:
    """Runs a training whose image files cannot be opened after some step, as after the loss of a file server."""

    def __init__(self, mapping: dict[str, Any], folder: Path, timeout_seconds: int, num_workers: int) -> None:
        self.images, self.log, self.output_dir = folder / "images", folder / "log", folder / "run"
        self.images.mkdir()
        for number in range(4):
            Image.new("RGB", (64, 64), (number * 60, 0, 0)).save(self.images / f"{number}.png")
        data = mapping["beit3_ds"]["data"]
        data["images"] |= {"train": [str(self.images)], "validation": []}
        data |= {"timeout_seconds": timeout_seconds, "num_workers": num_workers, "prefetch_steps": 1}
        never = {"total_steps": 100_000, "save_interval": 100_000, "eval_interval": 100_000}
        mapping["beit3_ds"]["training"] |= {**never, "output_dir": str(self.output_dir)}
        (folder / "sitecustomize.py").write_text(HANGING_READS)  # Python imports it first, in workers too
        search = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": search, "HANGING_FOLDER": str(self.images), "OMP_NUM_THREADS": "1"}
        config = write(mapping, folder)
        with self.log.open("w") as log:
            self.process = start_module("beit3_ds.train", [config], env=environment, output=log)
        deadline = time.monotonic() + BOUND_SECONDS
        while "step 2/" not in self.output():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()
            time.sleep(0.05)
        self.images.with_suffix(".hangs").touch()

    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(BOUND_SECONDS)
        finally:
            self.process.kill()

    def check_saved(self) -> int:
        """Checks that the last finished step was saved; returns its number."""
        saved = re.findall(r"^saved .*/step-(\d+) \(", self.output(), re.MULTILINE)
        assert len(saved) == 1, self.output()
        CheckpointFolder(self.output_dir / "checkpoints" / f"step-{saved[0]}").close()
        return int(saved[0])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_while_data_is_waited_for(run_mapping: dict[str, Any], tmp_path: Path, num_workers: int) -> None:
    """Checks that SIGTERM ends a wait for data: a cluster kills a run half a minute after SIGTERM."""
    hung = HungRun(run_mapping, tmp_path, 3600, num_workers)
    time.sleep(3)
    hung.process.send_signal(signal.SIGTERM)
    assert hung.wait() == 0, hung.output()
    step = hung.check_saved()
    assert f"stopped after step {step} on SIGTERM; the same command resumes" in hung.output()


@pytest.mark.parametrize("num_workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_read_that_never_returns_is_named_after_a_save(
    run_mapping: dict[str, Any], tmp_path: Path, num_workers: int
) -> None:
    hung = HungRun(run_mapping, tmp_path, 8, num_workers)
    assert hung.wait() == 2, hung.output()
    step = hung.check_saved()
    (line,) = (line for line in hung.output().splitlines() if line.startswith("error on rank 0"))
    assert re.search(rf"has waited \d+ s for step {step + 1}\b.*reading {hung.images}/\d\.png", line), line
    assert "data.timeout_seconds=8" in line and "Traceback" not in hung.output()


def test_killed_process_of_a_preparation_is_replaced(tmp_path: Path) -> None:
    """Catches concurrent.futures, which fails if a process is killed and waits forever if one is stopped."""
    texts = [tmp_path / f"{number}.tar" for number in range(2)]
    for path in texts:
        path.write_bytes(b"")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, signal, sys\n"
        "from beit3_ds.data.prepare import index as prepare_index\n"
        "from beit3_ds.data.prepare.index import IndexedShard\n"
        "def slow(tar, cache_dir, verify):\n"
        "    mark = tar + '.tried'\n"
        "    if tar.endswith('1.tar') and not os.path.exists(mark):\n"
        "        open(mark, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return IndexedShard(tar=tar, action='kept', num_samples=1)\n"
        "prepare_index._prepare_index = slow\n"
        "if __name__ == '__main__':\n"
        "    done = prepare_index.prepare_indices(sys.argv[1:], '.', num_processes=2)\n"
        "    print(json.dumps([shard.tar for shard in done]))\n"
    )
    done = subprocess.run(
        [sys.executable, script, *map(str, texts)], capture_output=True, text=True, timeout=BOUND_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(path) for path in texts]
    assert "died of SIGKILL" in done.stderr and f"which prepares {texts[1]}" in done.stderr

"""Starts a run twice at once with every launcher; one start trains, and the other reports which process does."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.run_config import small_run_mapping

ROOT = Path(__file__).parents[1]
_BOUND_SECONDS = 180


class Starts:
    """Starts one run any number of times."""

    def __init__(self, mapping: dict[str, Any], folder: Path, command: Sequence[str]) -> None:
        self._folder, self._command, self._number = folder, command, 0
        self.output_dir = folder / "run"
        training = {"output_dir": str(self.output_dir), "total_steps": 100_000, "save_interval": 5}
        mapping["beit3_ds"]["training"] |= {**training, "eval_interval": 100_000, "log_interval": 1}
        (folder / "config.json").write_text(json.dumps(mapping))
        (folder / "hosts").write_text("localhost slots=2\n")

    def begin(self) -> "Start":
        self._number += 1
        return Start(self._command, self._folder / f"printed_{self._number}")

    def holder(self) -> int:
        """Returns the id of the process that holds the output folder; call it once the run trains."""
        return int(json.loads((self.output_dir / "run.lock").read_text())["pid"])

    def saved_step(self) -> int:
        """Returns the step of the newest checkpoint, or 0."""
        latest = self.output_dir / "checkpoints" / "latest"
        return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


class Start:
    """Controls one start of the run, with all its child processes."""

    def __init__(self, command: Sequence[str], printed: Path) -> None:
        self._printed = printed
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with printed.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def printed(self) -> str:
        return self._printed.read_text()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def trains(self) -> bool:
        return re.search(r"^step \d+/", self.printed(), re.MULTILINE) is not None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_until(happened: Callable[[], Any], starts: Sequence[Start]) -> None:
    deadline = time.monotonic() + _BOUND_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "\n".join(start.printed() for start in starts)
        time.sleep(0.05)


def commands(folder: Path) -> dict[str, list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])  # both starts take one port, as with the default one
    config, python = str(folder / "config.json"), Path(sys.executable)
    deepspeed = [str(python.with_name("deepspeed")), "--num_gpus", "2", "--master_port", port]
    return {
        "python": [str(python), "-m", "beit3_ds.train", config],
        "deepspeed": [*deepspeed, "--module", "beit3_ds.train", config],
        "launch": [str(python), "-m", "beit3_ds.cli.main", "launch", str(folder / "hosts"), config],
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed", "launch"])
def test_of_two_starts_one_trains_and_its_successor_takes_over(
    launcher: str, tokenizer_files: dict[str, str], tmp_path: Path
) -> None:
    """Checks ten rounds of two starts; the training one is killed, and the next round resumes its training."""
    mapping = small_run_mapping(1, samples=(2, 2, 2))
    mapping["beit3_ds"]["tokenizers"]["text"] |= {"path": tokenizer_files["text"], "vocab_size": 300}
    mapping["beit3_ds"]["tokenizers"]["visual"]["path"] = tokenizer_files["visual"]
    run = Starts(mapping, tmp_path, commands(tmp_path)[launcher])
    saved = 0
    for number in range(10):
        pair = [run.begin(), run.begin()]
        try:
            saved = check_round(run, pair, launcher, saved, ends_supervisor=number % 2 == 1)
        finally:
            for start in pair:
                start.kill()


def check_round(run: Starts, pair: Sequence[Start], launcher: str, saved: int, *, ends_supervisor: bool) -> int:
    """Checks two starts and kills the one that trains; returns the last step that it saved."""
    began = time.monotonic()
    wait_until(lambda: any(start.has_ended() for start in pair), pair)
    refused_after = time.monotonic() - began
    refused, other = sorted(pair, key=lambda start: not start.has_ended())
    wait_until(other.trains, pair)
    trains_after, holder = time.monotonic() - began, run.holder()
    assert not other.has_ended()
    who = other.process.pid if launcher == "launch" else holder
    assert f"is in use by process {who} on host {socket.gethostname()} (" in refused.printed(), refused.printed()
    assert refused.process.returncode == 2
    assert "Traceback" not in refused.printed()
    resumed = re.search(r"^resuming after step (\d+) ", other.printed(), re.MULTILINE)
    assert (int(resumed[1]) if resumed else 0) >= saved, other.printed()
    wait_until(lambda: run.saved_step() > saved, pair)
    saved = run.saved_step()
    if launcher == "launch" and ends_supervisor:
        other.process.kill()  # its ranks lose their supervisor, save and end
    else:
        os.kill(holder, signal.SIGKILL)
    if launcher == "deepspeed":  # its launcher ends the other rank and itself
        wait_until(other.has_ended, pair)
    print(f"refused after {refused_after:.1f} s, trains after {trains_after:.1f} s, saved {saved}")
    return saved

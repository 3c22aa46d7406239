"""Fakes a trainer: takes steps of a few milliseconds, saves a checkpoint after each, and fails on request.

Arguments are those of the trainer, CONFIG --set=... --force; only training.output_dir and total_steps are used. With
--force, rank 0 moves the checkpoints of a finished run aside as soon as all ranks have reached step -1.

FAULTS is a JSON list of [rank, step, what], and each fault happens once in a run. `what` is a signal that the rank
sends to itself, an exit status, or "ignore" for a rank that ignores stop signals.

Ranks wait for each other in every step. They fail when another rank reports a fault, but wait forever for a stopped
rank.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from beit3_ds.config import load_run_config
from beit3_ds.runtime.stop_signals import STOP_SIGNALS

STEP_SECONDS = 0.02


class Ranks:
    """Connects the ranks of one attempt through files."""

    def __init__(self, folder: Path) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._folder = folder / f"meeting_{os.environ['MASTER_PORT']}"
        self._folder.mkdir(exist_ok=True, parents=True)

    def meet(self, step: int, vote: bool) -> bool:
        """Waits until all ranks have reached a step; returns whether any rank voted to end the run.

        Ends this process if a rank has reported a fault.
        """
        self._write(f"{self.rank}_{step}", str(int(vote)))
        files = [self._folder / f"{rank}_{step}" for rank in range(self.size)]
        while not all(file.exists() for file in files):
            for fault in self._folder.glob("fault_*"):
                time.sleep(0.3)  # as the trainers take theirs
                print(f"error on rank {self.rank}: {fault.read_text()}", flush=True)
                os._exit(1)
            time.sleep(0.005)
        return any(file.read_text() == "1" for file in files)

    def tell(self, what: str) -> None:
        """Tells the other ranks that this rank is about to fail."""
        self._write(f"fault_{self.rank}", f"rank {self.rank} does not answer ({what})")

    def _write(self, name: str, text: str) -> None:
        new = self._folder / f"new_{self.rank}"
        new.write_text(text)
        new.rename(self._folder / name)


def main() -> int:
    received: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    options = argparse.ArgumentParser()
    options.add_argument("config")
    options.add_argument("--set", action="append", default=[])
    options.add_argument("--force", action="store_true")
    arguments = options.parse_args()
    config = load_run_config(arguments.config, arguments.set).training
    folder = Path(config.output_dir)
    ranks = Ranks(folder)
    latest = folder / "checkpoints" / "latest"
    first = int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0
    moves_aside = arguments.force and first == config.total_steps
    if moves_aside:
        first = 0
    worker = subprocess.Popen(["sleep", "60"], env={**os.environ, "RUN": str(folder)})
    greeting = os.environ.get("GREETING")
    print(f"rank {ranks.rank} of {ranks.size}, worker {worker.pid}, from step {first}, {greeting}", flush=True)
    print(f"secrets {[name for name in os.environ if re.search('TOKEN|PASSWORD', name)]}", flush=True)
    ignores = False
    for step in range(-1 if moves_aside else first, config.total_steps):
        for number, (its_rank, its_step, what) in enumerate(json.loads(os.environ.get("FAULTS", "[]"))):
            mark = folder / f"fault_{number}"
            if (its_rank, its_step) == (ranks.rank, step) and not mark.exists():
                mark.touch()
                print(f"rank {ranks.rank} meets {what}", flush=True)
                if what == "ignore":
                    ignores = True
                    continue
                if what != "SIGSTOP":
                    ranks.tell(what)
                if isinstance(what, str):
                    os.kill(os.getpid(), signal.Signals[what])
                else:
                    return what
        if ranks.meet(step, bool(received)) and not ignores:
            print(f"rank {ranks.rank} stops on {[signal.Signals(number).name for number in received]}", flush=True)
            break
        if step < 0:
            if ranks.rank == 0:
                latest.parent.rename(folder / "checkpoints-1")
            continue
        time.sleep(STEP_SECONDS)
        if ranks.rank == 0:
            print(f"step {step + 1}", flush=True)
            latest.parent.mkdir(exist_ok=True, parents=True)
            latest.with_suffix(".new").write_text(f"step-{step + 1:08d}\n")
            latest.with_suffix(".new").replace(latest)
    return 0


if __name__ == "__main__":
    sys.exit(main())

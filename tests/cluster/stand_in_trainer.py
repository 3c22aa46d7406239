"""Stands in for the trainer: steps of a few milliseconds, a checkpoint after each, and faults at will.

Called as the trainer is: CONFIG --set=... . The config's training.output_dir and total_steps count. FAULTS is a JSON list
of [rank, step, what], each of which happens once in a run; `what` is a signal that the rank sends itself, a status that
it ends with, or "ignore", for a rank that does not stop when asked.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from beit3_ds.cluster.trainer_process import STOP_SIGNALS
from beit3_ds.config import load_run_config

STEP_SECONDS = 0.02


def main() -> int:
    received: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    config = load_run_config(sys.argv[1], [argument.removeprefix("--set=") for argument in sys.argv[2:]]).training
    rank, folder = int(os.environ["RANK"]), Path(config.output_dir)
    latest = folder / "checkpoints" / "latest"
    first = int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0
    size, worker = os.environ["WORLD_SIZE"], subprocess.Popen(["sleep", "1000"])
    print(f"rank {rank} of {size}, worker {worker.pid}, from step {first}, {os.environ.get('GREETING')}", flush=True)
    ignores = False
    for step in range(first, config.total_steps):
        time.sleep(STEP_SECONDS)
        for number, (its_rank, its_step, what) in enumerate(json.loads(os.environ.get("FAULTS", "[]"))):
            mark = folder / f"fault_{number}"
            if (its_rank, its_step) == (rank, step) and not mark.exists():
                mark.touch()
                print(f"rank {rank} meets {what}", flush=True)
                if what == "ignore":
                    ignores = True
                elif isinstance(what, str):
                    os.kill(os.getpid(), signal.Signals[what])
                else:
                    worker.kill()
                    return what
        if rank == 0:
            print(f"step {step + 1}", flush=True)
            latest.parent.mkdir(exist_ok=True, parents=True)
            latest.with_suffix(".new").write_text(f"step-{step + 1:08d}\n")
            latest.with_suffix(".new").replace(latest)
        if received and not ignores:
            print(f"rank {rank} stops on {signal.Signals(received[0]).name}", flush=True)
            break
    worker.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains one rank while the disk of the run fails at chosen steps.

Usage: python -m tests.disk_faults FOLDER FAULTS CONFIG

The process needs its own mount namespace, with a tmpfs at FOLDER. FAULTS is a JSON object from steps to faults: "fill"
uses up all space, "free" undoes that, and "read-only" and "writable" remount the folder. The main rank causes a fault
just before it writes the metrics of the step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from beit3_ds.train import main
from beit3_ds.training.metrics_log import MetricsLog

FILLER = "filler"


def cause(folder: Path, fault: str) -> None:
    """Causes a fault of the disk, or ends one."""
    if fault == "fill":
        _fill(folder / FILLER)
    elif fault == "free":
        (folder / FILLER).unlink()
    elif fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


def _fill(path: Path) -> None:
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def _run() -> int:
    folder, faults = Path(sys.argv[1]), {int(step): fault for step, fault in json.loads(sys.argv[2]).items()}
    append = MetricsLog.append

    def append_with_fault(log: MetricsLog, record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] in faults:
            cause(folder, faults.pop(record["step"]))
        append(log, record)

    MetricsLog.append = append_with_fault  # type: ignore[method-assign]
    os.environ["OMP_NUM_THREADS"] = "1"
    return main(sys.argv[3:])


if __name__ == "__main__":
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]  # from DeepSpeed's launcher
    sys.exit(_run())

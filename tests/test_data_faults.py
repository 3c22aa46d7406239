"""Workers that are killed or stopped and reads that never return, in whole runs: named, and nothing done is lost."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_stopping import others
from tests.checkpoint.training_run import TrainingRun, check_same_state
from tests.test_pretrain import losses

BOUND_SECONDS = 150
SETTINGS = {"total_steps": 12, "save_interval": 1000, "eval_interval": 1000}


def workers(run: TrainingRun) -> list[int]:
    """Those of the only rank: the server that they are forked from leads no threads that read."""
    found = []
    for pid in others(run):
        if "forkserver" in Path(f"/proc/{pid}/cmdline").read_text() and len(os.listdir(f"/proc/{pid}/task")) > 1:
            found.append(pid)
    return found


@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_lost_worker_changes_nothing(run_mapping: dict[str, Any], tmp_path: Path, blow: signal.Signals) -> None:
    """Catches a main process that waits for ever, and a step that is skipped, repeated or read differently."""
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


def test_killed_process_of_a_preparation_is_replaced(tmp_path: Path) -> None:
    """concurrent.futures ends with a traceback when a process is killed, and waits for ever when one is stopped."""
    texts = [tmp_path / f"{number}.tar" for number in range(2)]
    for path in texts:
        path.write_bytes(b"")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, signal, sys\n"
        "from beit3_ds.data import prepare_index\n"
        "from beit3_ds.data.prepare_index import IndexedShard\n"
        "def slow(tar, prepared_dir, verify):\n"
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

"""Tests that only descendants of a process are killed, even if their parents have ended or ids are reused."""

import subprocess
import sys
import time
from pathlib import Path

from beit3_ds.cluster.launch.process_tree import ProcessId, ProcessTree, kill_process

CHILDREN = "import subprocess, time; subprocess.Popen(['sleep', '1000'], start_new_session=True); time.sleep(1000)"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_child_in_another_session_is_killed_without_its_parent() -> None:
    other = subprocess.Popen(["sleep", "1000"])
    root = subprocess.Popen([sys.executable, "-c", CHILDREN])
    try:
        while not (found := children(root.pid)):
            time.sleep(0.01)
        tree = ProcessTree([root.pid])
        tree.watch()
        root.kill()
        root.wait()
        assert tree.kill() == found  # though nobody is its parent any more
        while Path(f"/proc/{found[0]}").exists():  # until init has waited for it
            time.sleep(0.01)
        assert tree.kill() == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_number_that_was_given_to_another_process_is_left_alone() -> None:
    other = subprocess.Popen(["sleep", "1000"])
    try:
        assert not kill_process(ProcessId(other.pid, 1))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()

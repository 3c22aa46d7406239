"""Tests that test hosts are separate from each other and from this machine, and fail like real hosts."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.hosts import Host, missing_for_hosts, namespace_hosts, write_hostfile

REASON = missing_for_hosts()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def _is_answered(host: Host, other: Host, seconds: int = 30) -> bool:
    return host.run(["ssh", "-o", f"ConnectTimeout={seconds}", other.name, "true"]).returncode == 0


def test_hosts_have_names_addresses_and_processes_of_their_own(two_hosts: list[Host], tmp_path: Path) -> None:
    first, second = two_hosts
    script = "hostname; echo $TMPDIR; ls /proc | grep -c '^[0-9]'"
    for done in (first.run(["ssh", second.name, script]), second.run(["bash", "-c", script])):
        name, temporary, processes = done.stdout.split()
        assert (name, temporary) == ("node1", str(second.folder / "tmp"))
        assert int(processes) < 10  # not those of this machine
    assert "10.1.0.2/24" in second.run(["ip", "address"]).stdout
    assert Path("/etc/hosts").read_text() != (first.folder / "hosts").read_text()

    sleeper = first.start(["sleep", "1000"])
    while not (pids := first.pids("^sleep")):
        time.sleep(0.01)
    assert not second.pids("^sleep")
    first.signal(pids[0], signal.SIGTERM)
    assert sleeper.wait(60) != 0
    with pytest.raises(ProcessLookupError):  # tests kill all that a host has
        first.signal(os.getpid(), 0)
    (file := tmp_path / "shared").write_text("")
    assert first.run(["ssh", second.name, f"ls {file}"]).returncode == 0  # the file system is shared
    assert write_hostfile(file, two_hosts, 8).read_text() == "node0 slots=8\nnode1 slots=8\n"


def test_links_and_sshd_can_fail(two_hosts: list[Host]) -> None:
    first, second = two_hosts
    second.cut_link()
    assert not _is_answered(first, second, seconds=2)
    second.restore_link()
    assert _is_answered(first, second)
    second.stop_sshd()
    assert "Connection refused" in first.run(["ssh", second.name, "true"]).stdout
    second.start_sshd()
    assert _is_answered(first, second)


def test_nothing_survives_a_crash_or_the_end() -> None:
    with namespace_hosts(2) as (first, second):
        started = [host.start(["bash", "-c", "trap '' TERM INT HUP; sleep 1000"]) for host in (first, second)]
        second.crash()
        assert started[1].wait(60) != 0 and started[0].poll() is None
        assert not _is_answered(first, second, seconds=2) and not second.pids()
        folder = first.folder
    assert started[0].wait(60) != 0
    assert not folder.exists()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            assert str(folder) not in file.read_text(errors="replace")


def test_a_command_that_hangs_is_an_error_with_what_it_printed(two_hosts: list[Host]) -> None:
    with pytest.raises(AssertionError, match=r"node0: bash .* has not ended after 1 s[^!]*so far"):
        two_hosts[0].run(["bash", "-c", "echo so far; sleep 1000"], timeout=1)

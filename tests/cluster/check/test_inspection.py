"""Tests `beit3 check-cluster` on healthy hosts, and on hosts with one fault each."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from beit3_ds.cli.main import main
from tests.hosts import Host, missing_for_hosts, namespace_hosts, write_hostfile

ROOT = Path(__file__).parents[3]
REASON = missing_for_hosts()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=REASON or "")

CONFIG = "ds_configs/quickstart_cpu.json"
# A layout that two ranks cannot have: a fault of its own, and without a model of memory torch is not imported.
MISFIT = ["--set", "parallel.tensor_parallel_size=3"]
# What nvidia-smi prints: recorded from the documentation of its CSV format, not on a GPU of ours.
RECORDED_GPU = "NVIDIA H100 80GB HBM3, 81559, 4"
BUSY_GPU = "NVIDIA H100 80GB HBM3, 81559, 61440"


@pytest.fixture
def only(tmp_path: Path) -> Path:
    """Returns an empty folder that is in the PYTHONPATH of every host.

    One host can mount another folder over it.
    """
    (folder := tmp_path / "only").mkdir()
    return folder


def check(
    host: Host,
    hostfile: Path,
    *arguments: str,
    python_path: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Runs `beit3 check-cluster` on a host; returns exit status and output."""
    path = os.pathsep.join([*map(str, python_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = [sys.executable, "-m", "beit3_ds.cli.main", "check-cluster", str(hostfile), *arguments]
    done = host.run(argv, {"PYTHONPATH": path, **(environment or {})})
    return done.returncode, done.stdout


def faults(printed: str) -> list[str]:
    """Returns the lines that describe a fault."""
    return [line.removeprefix("* ") for line in printed.splitlines() if line.startswith("* ")]


def cell(printed: str, host: str, column: str) -> str:
    """Returns one cell of the printed table, by host and column."""
    lines = printed.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("host "))
    begin = lines[head].index(f" {column} " if f" {column} " in lines[head] else f" {column}") + 1
    row = next(line for line in lines[head:] if line.startswith(f"{host} "))
    return row[begin:].split("  ")[0]


def assert_one_fault(result: tuple[int, str], column: str, *words: str, host: str = "node1") -> None:
    """Checks that exactly one fault was found: on the right host, in the right column and with the given words."""
    status, printed = result
    told = faults(printed)
    assert status == 1 and len(told) == 1, printed
    assert told[0].startswith(f"{host}: ") and told[0].endswith("."), printed
    for word in words:
        assert word in told[0], told[0]
    assert cell(printed, host, column).startswith("!"), printed
    assert printed.count("!") == 1, printed


@contextmanager
def mounted(host: Host, target: Path | str, *source: Path | str) -> Iterator[None]:
    """Mounts a file, a folder or an empty file system of 1 MiB at a path that only one host sees."""
    arguments = ["--bind", *map(str, source)] if source else ["-t", "tmpfs", "-o", "size=1m", "none"]
    done = host.run(["mount", *arguments, str(target)])
    assert done.returncode == 0, done.stdout
    try:
        yield
    finally:
        done = host.run(["umount", "--lazy", str(target)])
        assert done.returncode == 0, done.stdout


@needs_hosts
def test_a_healthy_pair_passes_and_nothing_is_left(two_hosts: list[Host], tmp_path: Path) -> None:
    (output := tmp_path / "out").mkdir()
    hostfile = write_hostfile(tmp_path / "hosts", two_hosts)
    begin = time.monotonic()
    status, printed = check(two_hosts[0], hostfile, CONFIG, "--set", f"training.output_dir={output}/run")
    assert status == 0 and not faults(printed), printed
    assert time.monotonic() - begin < 60  # 6 s on an idle machine
    assert "2 hosts, 2 ranks: no fault found" in printed and "!" not in printed
    for index, host in enumerate(two_hosts):
        assert cell(printed, host.name, "network") == f"eth0 {host.address}"
        assert cell(printed, host.name, "port") == ("free" if index == 0 else "-")
        assert cell(printed, host.name, "shared") == "yes"
    assert not list(output.iterdir())


def test_localhost_needs_neither_ssh_nor_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env").symlink_to("/usr/bin/env")
    monkeypatch.setenv("PATH", str(tmp_path))  # in which there is nothing else
    monkeypatch.chdir(ROOT)
    with socket.socket() as trial:
        trial.bind(("", 0))
        port = trial.getsockname()[1]
    assert main(["check-cluster", "hostfiles/localhost", "--master-port", str(port)]) == 0
    assert "1 host, 2 ranks: no fault found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "hostfile none does not exist"),
        (["hostfiles/localhost", "none.json"], "no such config file"),
        (["hostfiles/localhost", "--set", "training.seed=1"], "--set changes a config, but none was named"),
        (
            ["hostfiles/localhost", "--master-port", "0"],
            "argument --master-port: it is 0; it must be between 1 and 65535",
        ),
    ],
)
def test_what_cannot_be_read_ends_with_status_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["check-cluster", *arguments]) == 2
    assert words in capsys.readouterr().err


@needs_hosts
def test_another_version_of_torch(two_hosts: list[Host], tmp_path: Path, only: Path) -> None:
    (metadata := tmp_path / "planted" / "torch-9.9.9.dist-info").mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    with mounted(two_hosts[1], only, metadata.parent):
        found = check(two_hosts[0], write_hostfile(tmp_path / "hosts", two_hosts), python_path=[only])
    assert_one_fault(found, "torch", "torch is 9.9.9, not", "as on node0", "install torch 2")


@needs_hosts
def test_other_code(two_hosts: list[Host], tmp_path: Path) -> None:
    (planted := tmp_path / "batch.py").write_text((ROOT / "beit3_ds/batch.py").read_text() + "\n")
    with mounted(two_hosts[1], ROOT / "beit3_ds/batch.py", planted):
        found = check(two_hosts[0], write_hostfile(tmp_path / "hosts", two_hosts))
    assert_one_fault(found, "code", "1 of the project's files differ from those of node0: beit3_ds/batch.py")


@needs_hosts
def test_no_python_on_a_node(two_hosts: list[Host], tmp_path: Path) -> None:
    with mounted(two_hosts[1], Path(sys.executable).parent):
        found = check(two_hosts[0], write_hostfile(tmp_path / "hosts", two_hosts))
    assert_one_fault(found, "answer", f"has no Python at {sys.executable}", "Install the same environment")


@needs_hosts
def test_more_slots_than_gpus_and_a_busy_gpu(two_hosts: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hosts", two_hosts, slots=8)
    programs = [tmp_path / name for name in ("healthy", "planted")]
    for folder in programs:
        folder.mkdir()
        _write_nvidia_smi(folder, [RECORDED_GPU] * 8)
    with mounted(two_hosts[0], "/usr/local/bin", programs[0]), mounted(two_hosts[1], "/usr/local/bin", programs[1]):
        healthy = check(two_hosts[0], hostfile)
        assert healthy[0] == 0 and cell(healthy[1], "node1", "GPUs") == "8x80GiB", healthy[1]
        _write_nvidia_smi(programs[1], [RECORDED_GPU] * 7)
        fewer = check(two_hosts[0], hostfile)
        _write_nvidia_smi(programs[1], [*[RECORDED_GPU] * 7, BUSY_GPU])
        busy = check(two_hosts[0], hostfile)
    assert_one_fault(fewer, "GPUs", "slots=8 in the hostfile, but nvidia-smi lists 7 GPUs", "write slots=7")
    assert_one_fault(busy, "GPUs", "60.0 GiB of GPU 7 are in use")


def _write_nvidia_smi(folder: Path, lines: list[str]) -> None:
    (program := folder / "nvidia-smi").write_text("#!/bin/sh\ncat <<E\n" + "\n".join(lines) + "\nE\n")
    program.chmod(0o755)


@needs_hosts
def test_a_full_disk_that_is_not_shared(two_hosts: list[Host], tmp_path: Path) -> None:
    (output := tmp_path / "out").mkdir()
    hostfile = write_hostfile(tmp_path / "hosts", two_hosts)
    with mounted(two_hosts[1], output):  # of 1 MiB
        status, printed = check(two_hosts[0], hostfile, CONFIG, *MISFIT, "--set", f"training.output_dir={output}/run")
    disk, shared, _ = faults(printed)
    assert cell(printed, "node1", "files") == cell(printed, "node0", "files") != "0"
    assert status == 1
    assert disk.startswith(
        f"node1: 1.0 MiB of 1.0 MiB are free on the disk of {output}/run, but temporary files and logs"
    )
    assert shared.startswith(f"node1: and node0 do not see what the other wrote into {output}: the output folder")
    assert not list(output.iterdir())


@needs_hosts
def test_an_output_folder_that_is_missing_elsewhere(two_hosts: list[Host], tmp_path: Path) -> None:
    (output := tmp_path / "mount" / "out").mkdir(parents=True)
    hostfile = write_hostfile(tmp_path / "hosts", two_hosts)
    with mounted(two_hosts[1], output.parent):
        status, printed = check(two_hosts[0], hostfile, CONFIG, *MISFIT, "--set", f"training.output_dir={output}")
    disk, shared, layout = faults(printed)
    assert status == 1 and disk.startswith("node1: 1.0 MiB")
    assert shared.startswith(f"node1: cannot write into {output}")
    assert "No such file or directory" in shared
    assert "tensor_parallel_size=3" in layout and "does not divide world_size=2" in layout


@needs_hosts
def test_a_clock_that_is_slow(two_hosts: list[Host], tmp_path: Path, only: Path) -> None:
    # The clocks of namespaces cannot differ: Python's is shifted on that host.
    (planted := tmp_path / "planted").mkdir()
    (planted / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() - 90\n")
    with mounted(two_hosts[1], only, planted):
        found = check(two_hosts[0], write_hostfile(tmp_path / "hosts", two_hosts), python_path=[only])
    assert_one_fault(found, "clock", "its clock is 90.0 s behind that of node0", "timedatectl")
    assert "-90.0 s" in found[1]


@needs_hosts
def test_a_master_port_that_is_taken(two_hosts: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hosts", two_hosts)
    program = "import socket; s = socket.create_server(('', 29500)); print('up', flush=True); s.accept()"
    taker = two_hosts[0].start([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert taker.stdout is not None and taker.stdout.readline() == b"up\n"
    try:
        found = check(two_hosts[0], hostfile)
        assert check(two_hosts[0], hostfile, "--master-port", "29501")[0] == 0
    finally:
        two_hosts[0].clear()
        taker.communicate()
    assert_one_fault(found, "port", "port 29500", "is taken by process", "another --master_port", host="node0")


@needs_hosts
def test_layout_and_memory_that_do_not_fit(two_hosts: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hosts", two_hosts, slots=2)
    (programs := tmp_path / "bin").mkdir()
    _write_nvidia_smi(programs, [RECORDED_GPU.replace("81559", "11264")] * 2)
    config = str(ROOT / "ds_configs/beit3_4b_tp2_pp2_zero1.json")
    with mounted(two_hosts[0], "/usr/local/bin", programs), mounted(two_hosts[1], "/usr/local/bin", programs):
        changes = ["--set", f"training.output_dir={tmp_path}"]
        status, printed = check(two_hosts[0], hostfile, config, *changes)
    *told, data = faults(printed)
    assert status == 1 and len(told) == 2, printed
    assert data.startswith("no node has files that match 'data/imagenet21k/train-*.tar', ")
    for index, line in enumerate(told):
        assert line.startswith(f"node{index}: rank ") and "more than 90% of the 11.0 GiB of its NVIDIA H100" in line


@needs_hosts
def test_nodes_that_do_not_let_in_or_do_not_answer(tmp_path: Path) -> None:
    with namespace_hosts(3) as hosts:
        hosts[1].stop_sshd()
        hosts[2].cut_link()
        begin = time.monotonic()
        status, printed = check(hosts[0], write_hostfile(tmp_path / "hosts", hosts))
        assert time.monotonic() - begin < 60  # 5 s is what ssh waits for
    assert status == 1
    refused, silent = faults(printed)
    assert refused.startswith("node1: cannot be reached by ssh; its last line: 'ssh: connect to host node1 port 22:")
    assert "Connection refused" in refused and "ssh -oBatchMode=yes node1 true" in refused
    assert silent.startswith("node2: cannot be reached by ssh") and ("timed out" in silent or "No route" in silent)
    assert cell(printed, "node0", "answer").endswith(" s")


@needs_hosts
def test_names_that_lead_astray(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    with namespace_hosts(2) as hosts:
        hosts[1].run(["ip", "address", "add", "10.1.0.102/24", "dev", "eth0"])
        hosts[0].add_name("10.1.0.102 other")
        hostfile.write_text("node0 slots=1\nnode1 slots=1\nother slots=1\n")
        twice = check(hosts[0], hostfile)

        write_hostfile(hostfile, hosts)
        hosts[1].add_name("127.0.1.1 node1")  # as Debian's installer does
        trap = check(hosts[0], hostfile)
        named = check(hosts[0], hostfile, environment={"GLOO_SOCKET_IFNAME": "eth0"})
        misnamed = check(hosts[0], hostfile, environment={"GLOO_SOCKET_IFNAME": "ib0"})

        # Docker's bridge may come first in `hostname -I`, which is where DeepSpeed takes MASTER_ADDR from.
        for change in (["del", "10.1.0.1/24"], ["add", "172.17.0.1/16"], ["add", "10.1.0.1/24"]):
            hosts[0].run(["ip", "address", *change, "dev", "eth0"])
        bridge = check(hosts[0], hostfile, environment={"GLOO_SOCKET_IFNAME": "eth0"})

        # Where the other host has such a bridge too, the address leads to itself, and something may listen there.
        hosts[1].run(["ip", "address", "add", "172.17.0.1/16", "dev", "lo"])
        program = (
            "import socket; s = socket.create_server(('', 29500)); print('up', flush=True)\nwhile True: s.accept()"
        )
        other = hosts[1].start([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert other.stdout is not None and other.stdout.readline() == b"up\n"
        itself = check(hosts[0], hostfile, environment={"GLOO_SOCKET_IFNAME": "eth0"})
        hosts[1].clear()
        other.communicate()
    assert_one_fault(twice, "answer", "is the same machine as node1", host="other")
    note = "note: node1: its own name 'node1' resolves to 127.0.1.1 there, which no other node can reach. Ranks of"
    assert trap[0] == 0 and note in trap[1] and cell(trap[1], "node1", "network").startswith("~"), trap[1]
    assert named[0] == 0 and "note" not in named[1]
    assert "node1: GLOO_SOCKET_IFNAME=ib0 is set, but its interfaces are lo, eth0" in misnamed[1]
    assert_one_fault(bridge, "network", "cannot connect to node0 (172.17.0.1, port 29500", "--master_addr node0")
    assert_one_fault(itself, "network", "cannot connect to node0 (172.17.0.1", "another machine or program answers")


@pytest.mark.slow
@needs_hosts
def test_a_throttled_link_is_named(tmp_path: Path) -> None:
    with namespace_hosts(3) as hosts:
        hostfile = write_hostfile(tmp_path / "hosts", hosts)
        healthy = check(hosts[0], hostfile, "--bandwidth")
        expecting = check(hosts[0], hostfile, "--bandwidth", "--expect-gbit", "10000")
        hosts[2].throttle("50mbit")
        throttled = check(hosts[0], hostfile, "--bandwidth")
    assert healthy[0] == 0 and "all-reduce over 3 nodes" in healthy[1], healthy[1]
    assert expecting[0] == 1 and "half of the 1e+04 Gbit/s that were expected" in expecting[1]
    (told,) = faults(throttled[1])
    assert throttled[0] == 1 and told.startswith("node2: sends to every other node at 0.0"), throttled[1]


@pytest.mark.slow
@needs_hosts
def test_a_throttled_pair_is_named(two_hosts: list[Host], tmp_path: Path) -> None:
    two_hosts[0].throttle("50mbit")
    hostfile = write_hostfile(tmp_path / "hosts", two_hosts)
    status, printed = check(two_hosts[0], hostfile, "--bandwidth")
    (told,) = faults(printed)
    assert status == 1 and told.startswith("node0: sends to node1 at 0.0") and "links reach here" in told
    two_hosts[1].throttle("50mbit")
    status, printed = check(two_hosts[0], hostfile, "--bandwidth")
    assert status == 1 and printed.count("below 0.5 Gbit/s, half of the slowest network") == 2, printed

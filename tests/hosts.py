"""Builds hosts from Linux namespaces, where real launchers start real ranks over a network that can be cut.

Each host has its own network, hostname, processes, /etc/hosts, /run, /dev/shm and sshd. All hosts share files, like a
cluster with a shared file system. A switch with its own network namespace connects the hosts. So this machine's network
stays unchanged, and any number of tests can have hosts at the same time. Hosts and switch consist of processes only, so
nothing remains when they end, even if the tests are killed.
"""

import ipaddress
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
"""Name of the network interface on every host."""
_SSH_PORT = 22
_LISTENER = r"^sshd: .*\[listener\]"
_PROGRAMS = ("unshare", "nsenter", "ip", "tc", "ssh", "sshd", "ssh-keygen", "bash", "mount")

# What the first process of a host prepares. $1 is the host's folder, $2 its name.
_PREPARE_HOST = """
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh" /etc/ssh
if [ -d ~/.ssh ]; then mount -t tmpfs none ~/.ssh; fi
mount -t tmpfs none /run
mount -t tmpfs none /dev/shm
mkdir -p /run/sshd
echo "$2" > /proc/sys/kernel/hostname
"""
_PREPARE_SWITCH = """
ip link add switch type bridge
ip link set switch up
"""
_SSH_CONFIG = """
Host *
  IdentityFile /etc/ssh/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_SSHD_CONFIG = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
MaxStartups 100
SetEnv TMPDIR={temporary}
"""


class Switch:
    """Connects the hosts by a bridge in a separate network namespace."""

    def __init__(self) -> None:
        """Creates a switch without ports."""
        self._process = _start_namespaces(["--net"], _PREPARE_SWITCH)

    def ip(self, *arguments: str) -> None:
        """Runs the command `ip` in the switch's network."""
        subprocess.run(["nsenter", f"--target={self._process.pid}", "--net", "ip", *arguments], check=True)

    def connect(self, port: str, pid: int) -> None:
        """Creates a port, and connects it to `INTERFACE` in the network of a process."""
        self.ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(pid))
        self.ip("link", "set", port, "master", "switch", "up")

    def close(self) -> None:
        """Removes the switch."""
        self._process.kill()
        self._process.communicate()


class Host:
    """Controls one of the hosts of `namespace_hosts`."""

    def __init__(self, name: str, address: str, folder: Path, switch: Switch) -> None:
        """Starts a host without sshd; `folder` holds its mounted files (`_start_host`)."""
        self.name, self.address, self.folder, self._switch = name, address, folder, switch
        options = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._unshare = _start_namespaces(options, _PREPARE_HOST, str(folder), name)
        self._init_pid = int(Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text())
        self._init = os.pidfd_open(self._init_pid)  # its number may be another's once it has ended
        self._namespace = os.readlink(f"/proc/{self._init_pid}/ns/pid")
        # Tests kill every process of a host: without processes of its own, that would be every one of this machine.
        assert self._namespace != os.readlink("/proc/self/ns/pid"), f"{name} shares the processes of this machine"
        switch.connect(name, self._init_pid)
        network = f"ip link set lo up; ip address add {address}/24 dev {INTERFACE}; ip link set {INTERFACE} up"
        self.run(["bash", "-c", network])

    def command(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        """Returns a command for this machine that runs `argv` on the host, in the current folder."""
        enter = ["nsenter", f"--target={self._init_pid}", "--net", "--uts", "--mount", "--pid"]
        variables = {"TMPDIR": str(self.folder / "tmp"), **(environment or {})}
        return [*enter, "env", f"--chdir={Path.cwd()}", *(f"{k}={v}" for k, v in variables.items()), *argv]

    def start(
        self, argv: Sequence[str], environment: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen:
        """Starts a command on the host; `popen` are arguments of `subprocess.Popen`.

        The returned process ends with the status of the command. To send a signal to the command itself, use `signal`.
        """
        return subprocess.Popen(self.command(argv, environment), **popen)

    def run(
        self, argv: Sequence[str], environment: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the host; `stdout` of the result includes standard error.

        Raises:
            AssertionError: if the command takes longer than `timeout` seconds; the message has its output.
        """
        with tempfile.TemporaryFile("w+") as output:  # not a pipe, which what it leaves behind would hold open
            process = self.start(argv, environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            ended = process.poll() is not None
            process.kill()
            status = process.wait()
            output.seek(0)
            printed = output.read()
        assert ended, f"{self.name}: {' '.join(argv)} has not ended after {timeout} s. It printed:\n{printed}"
        return subprocess.CompletedProcess(list(argv), status, printed)

    def pids(self, pattern: str = "") -> list[int]:
        """Returns ids of the host's processes whose command line matches a regular expression.

        The ids are those of this machine.
        """
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if os.readlink(folder / "ns/pid") == self._namespace and re.search(pattern, " ".join(words)):
                    found.append(int(folder.name))
        return [pid for pid in found if pid != self._init_pid]

    def listeners(self) -> set[tuple[str, int]]:
        """Returns the addresses and TCP ports at which programs of the host listen, without its sshd."""
        found = set()
        for table, size in (("tcp", 4), ("tcp6", 16)):
            for line in Path(f"/proc/{self._init_pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, port = local.split(":")
                words = [bytes.fromhex(address)[start : start + 4][::-1] for start in range(0, size, 4)]
                if state == "0A" and int(port, 16) != _SSH_PORT:
                    found.add((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
        return found

    def signal(self, pid: int, number: int) -> None:
        """Sends a signal to a process id from `pids`.

        Raises:
            ProcessLookupError: if the process has ended or does not belong to the host.
        """
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/pid")
        except FileNotFoundError:
            namespace = ""
        if namespace != self._namespace:
            raise ProcessLookupError(f"process {pid} is not one of {self.name}'s")
        os.kill(pid, number)

    def add_name(self, line: str) -> None:
        """Inserts a line at the top of the host's /etc/hosts, such as `127.0.1.1 node0`."""
        file = self.folder / "hosts"  # written in place: it is mounted
        file.write_text(f"{line}\n{file.read_text()}")

    def cut_link(self) -> None:
        """Drops all packets of the host without closing connections, like a pulled cable."""
        self._switch.ip("link", "set", self.name, "down")

    def restore_link(self) -> None:
        """Connects the host again after `cut_link`."""
        self._switch.ip("link", "set", self.name, "up")

    def throttle(self, rate: str | None) -> None:
        """Limits the rate of outgoing data, for example to "10mbit" per second; None removes the limit."""
        self.run(["tc", "qdisc", "del", "dev", INTERFACE, "root"])
        if rate is not None:
            limit = ["tbf", "rate", rate, "burst", "64kb", "latency", "500ms"]
            done = self.run(["tc", "qdisc", "add", "dev", INTERFACE, "root", *limit])
            assert done.returncode == 0, done.stdout

    def start_sshd(self) -> None:
        """Starts the sshd, which every new host has running."""
        sshd = _find("sshd")
        assert sshd is not None
        done = self.run([sshd, "-E", str(self.folder / "sshd.log")])
        assert done.returncode == 0, f"{done.stdout}\n{(self.folder / 'sshd.log').read_text()}"

    def stop_sshd(self) -> None:
        """Stops the sshd; new logins fail, and existing ones stay open."""
        for pid in self.pids(_LISTENER):
            self.signal(pid, signal.SIGKILL)

    def clear(self) -> None:
        """Kills all processes of the host except the sshd, for the next test."""
        for pid in set(self.pids()) - set(self.pids(_LISTENER)):
            with suppress(ProcessLookupError):
                self.signal(pid, signal.SIGKILL)

    def crash(self) -> None:
        """Crashes the host: cuts its link first, so that no peer is notified, and then kills every process."""
        self.cut_link()
        self.close()

    def close(self) -> None:
        """Ends the host and all its processes, which cannot prevent it."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init, signal.SIGKILL)  # the kernel kills the rest
        self._unshare.communicate()


def write_hostfile(path: Path, hosts: Sequence[Host], slots: int = 1) -> Path:
    """Writes a DeepSpeed hostfile with an equal number of slots per host; returns its path."""
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
    return path


@contextmanager
def namespace_hosts(count: int) -> Iterator[list[Host]]:
    """Starts hosts node0, node1, ... at 10.1.0.1, 10.1.0.2, ... that reach each other by name and by ssh.

    The hosts share this machine's files. Each host has its own TMPDIR, also in ssh sessions.
    """
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        root = Path(folder)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / "key"], check=True)
        hosts: list[Host] = []
        switch = Switch()
        try:
            for index in range(count):
                hosts.append(_start_host(root, index, count, switch))
            yield hosts
        finally:
            for host in hosts:
                host.close()
            switch.close()


def _start_host(root: Path, index: int, count: int, switch: Switch) -> Host:
    folder = root / f"node{index}"
    (folder / "ssh").mkdir(parents=True)
    (folder / "tmp").mkdir()
    for file in ("key", "key.pub"):
        shutil.copy(root / file, folder / "ssh" / file)  # with its mode, which ssh looks at
    (folder / "ssh" / "ssh_config").write_text(_SSH_CONFIG)
    (folder / "ssh" / "sshd_config").write_text(_SSHD_CONFIG.format(temporary=folder / "tmp"))
    names = "".join(f"10.1.0.{other + 1} node{other}\n" for other in range(count))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    host = Host(f"node{index}", f"10.1.0.{index + 1}", folder, switch)
    host.start_sshd()
    return host


def _start_namespaces(options: Sequence[str], prepare: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a shell in new namespaces; it lives until its standard input, a pipe from this process, is closed."""
    script = f"set -e\n{prepare}\necho ready\nread -r _ || true"
    argv = ["unshare", *options, "bash", "-c", script, "bash", *arguments]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise AssertionError(f"namespaces could not be made: {process.communicate()[1]}")
    return process


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=f"{Path(sys.executable).parent}:/usr/sbin:/sbin")


def missing_for_hosts(*programs: str) -> str | None:
    """Returns what this machine lacks for `namespace_hosts` and how to install it, or None."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root: run the tests as root, for example in a container"
    if lacking := [program for program in (*_PROGRAMS, *programs) if _find(program) is None]:
        return f"{', '.join(lacking)} not installed: .ci/install_cluster_programs, or pip install '.[test]' for mpirun"
    trial = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    tried = subprocess.run(trial, capture_output=True, text=True)
    if tried.returncode != 0:
        return f"this machine does not let root make namespaces (docker run --privileged does): {tried.stderr.strip()}"
    return None

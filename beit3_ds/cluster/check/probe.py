"""Runs on each node during a cluster check, and answers questions about the node. Each answer is one line of JSON.

This module's source text is sent over ssh to `python -c`. So the module needs only Python 3.8 and the standard library.
The program reads requests from standard input, and ends when standard input closes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import threading
import time

MARK = "beit3-probe "
"""Prefix of every line with an answer. The login shell may print other lines, which lack this prefix."""
_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")
_GPU_SECONDS = 25  # without the persistence daemon, the driver takes seconds per GPU to start
_CONNECT_SECONDS = 3.0
_SIZED_FILES = 1000  # files per pattern whose size is read, because a network file system needs time for each


class Probe:
    """Answers questions about this node: each public method is one question. Arguments and results have JSON types."""

    def __init__(self) -> None:
        """Creates a probe; no port is open and no file is written yet."""
        self._written: list[str] = []
        self._listeners: list[socket.socket] = []

    def machine(self, folder: str) -> dict:
        """Returns facts about this machine, by name.

        Also changes the current directory to `folder`, where ranks would start.
        """
        folder_error = _enter(folder)
        return {
            "hostname": socket.gethostname(),
            # Containers on one machine share its boot but have separate networks.
            "identity": [_read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/net")],
            "folder_error": folder_error,
            "python": platform.python_version(),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "shared_memory": _free_bytes("/dev/shm").get("total"),
            "cores": len(os.sched_getaffinity(0)),
            "addresses": _own_addresses(),
            "interfaces": [name for _, name in socket.if_nameindex()],
            "own_name": _own_name_address(),
            "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        }

    def software(self, module_text: str) -> dict:
        """Returns the versions of the installed packages, and a digest of each source file of the project.

        Args:
            module_text: source text of `runtime/versions.py`, because this node may lack the file or have an old
                version.
        """
        module: dict = {}
        exec(compile(module_text, "versions", "exec"), module)
        return {"versions": module["find_package_versions"](), "code": module["compute_code_digests"]()}

    def gpus(self) -> dict:
        """Returns the GPUs that nvidia-smi lists, and nvidia-smi's error message or None.

        If nvidia-smi is not installed, the list is empty and the error message is None.
        """
        try:
            done = subprocess.run(
                _GPU_QUERY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_GPU_SECONDS, check=False
            )
        except FileNotFoundError:
            return {"gpus": [], "error": None}
        except subprocess.TimeoutExpired:
            return {"gpus": [], "error": f"no answer within {_GPU_SECONDS} s"}
        except OSError as error:
            return {"gpus": [], "error": error.strerror}
        text = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            return {"gpus": [], "error": (text.strip().splitlines() or [f"status {done.returncode}"])[-1]}
        return {"gpus": parse_gpus(text), "error": None}

    def disk(self, folder: str) -> dict:
        """Returns the total bytes of the file system of `folder`, and the bytes that are free for ordinary users.

        If the folder does not exist, the nearest existing parent folder is used.
        """
        return _free_bytes(existing_parent(folder))

    def files(self, patterns: list[str]) -> list[list]:
        """Counts the files that match each glob pattern, and computes a digest of the files' names and sizes.

        The digest covers the names of all files, but only the sizes of the first 1000 files.

        Returns:
            [count, digest] for each pattern.
        """
        found = []
        for pattern in patterns:
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            sizes = [os.path.getsize(match) for match in matches[:_SIZED_FILES] if os.path.isfile(match)]
            found.append([len(matches), hashlib.sha256(repr([matches, sizes]).encode()).hexdigest()[:12]])
        return found

    def clock(self) -> float:
        """Returns the time of this machine's clock in seconds since 1970."""
        return time.time()

    def parent(self, folder: str) -> str:
        """Returns `folder` if it exists, else the nearest existing parent folder."""
        return existing_parent(folder)

    def write_token(self, path: str, token: str) -> str | None:
        """Writes `token` into a new file for other nodes to read; returns an error message, or None after success.

        `close` deletes the file.
        """
        try:
            with open(path, "x") as file:
                self._written.append(path)
                file.write(token)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error.strerror
        return None

    def read_tokens(self, paths: list[str], patience: float) -> list[str | None]:
        """Returns the content of each file, or None for a file that does not appear within `patience` seconds."""
        deadline = time.monotonic() + patience
        found: list[str | None] = [None] * len(paths)
        while True:
            for index, path in enumerate(paths):
                if found[index] is None:
                    found[index] = _read(path)
            if None not in found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def resolve(self, name: str) -> list[str]:
        """Returns the addresses that this node finds for a host name; an empty list if the name is unknown."""
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError:
            return []
        return [str(entry[4][0]) for entry in found]

    def listen(self, port: int, token: str, addresses: list[str]) -> dict:
        """Listens at some addresses of this node, and sends `token` to every client.

        Args:
            port: port to listen on; 0 means any free port.
            token: text to send to every client.
            addresses: addresses to listen at. The first address is required, and the others are optional.

        Returns:
            Dict with three keys. "wanted" is the argument `port`. "port" is the port on which this method listens: the
            wanted port or, if this cannot be used at the first address, a free port. "owner" is None if the wanted port
            can be used. Otherwise, "owner" describes the process that listens on the wanted port; if no such process is
            found, "owner" is the error message.
        """
        first, *others = addresses
        owner = None
        try:
            listeners = [_listen(first, port)]
        except OSError as error:
            owner = _owner_of(port) or error.strerror
            listeners = [_listen(first, 0)]
        found = listeners[0].getsockname()[1]
        for address in others:
            with contextlib.suppress(OSError):
                listeners.append(_listen(address, found))
        self._listeners += listeners
        for listener in listeners:
            threading.Thread(target=_serve_token, args=(listener, token), daemon=True).start()
        return {"wanted": port, "port": found, "owner": owner}

    def connect(self, targets: list[list]) -> list[dict]:
        """Connects to all targets in parallel. A target is `[address, port]`.

        Returns:
            One dict per target. After success, the dict has the received token, the two addresses of the connection,
            and the network interface. After a failure, the dict has the error.
        """
        results: list[dict] = [{} for _ in targets]
        threads = [
            threading.Thread(target=_connect, args=(str(address), int(port), result))
            for (address, port), result in zip(targets, results)  # noqa: B905 (strict= is younger than 3.8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def close(self) -> None:
        """Deletes the files that this probe has written."""
        for path in self._written:
            with contextlib.suppress(OSError):
                os.unlink(path)


def parse_gpus(text: str) -> list[dict]:
    """Parses the output of nvidia-smi: name, total bytes and used bytes of each GPU. An unknown size is None."""
    gpus = []
    for line in filter(str.strip, text.splitlines()):
        name, total, used = (part.strip() for part in line.rsplit(",", 2))
        sizes = [int(size) * 2**20 if size.isdigit() else None for size in (total, used)]
        gpus.append({"name": name, "total": sizes[0], "used": sizes[1]})
    return gpus


def existing_parent(folder: str) -> str:
    """Returns `folder` if it exists, else the nearest existing parent folder."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _free_bytes(folder: str) -> dict:
    try:
        size = os.statvfs(folder)
    except OSError as error:
        return {"error": error.strerror}
    return {"free": size.f_bavail * size.f_frsize, "total": size.f_blocks * size.f_frsize}


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip() or None
    except OSError:
        return None


def _enter(folder: str) -> str | None:
    try:
        os.chdir(folder)
    except OSError as error:
        return error.strerror
    return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _own_addresses() -> list[str]:
    """Returns the addresses that `hostname -I` prints. DeepSpeed uses the first address of node 0 as MASTER_ADDR."""
    try:
        done = subprocess.run(["hostname", "-I"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.decode(errors="replace").split()


def _own_name_address() -> str | None:
    """Returns the IP address of this machine's own host name, as gloo would announce it to other nodes.

    Like gloo, takes the first address of the host name to which a socket can be bound. Returns None if the host name
    has no such address.
    """
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
            return str(address[0])
    return None


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port in TIME_WAIT is free
        listener.bind((address, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _serve_token(listener: socket.socket, token: str) -> None:
    while True:
        try:
            connection = listener.accept()[0]
        except OSError:
            return
        with contextlib.suppress(OSError), connection:
            connection.sendall(token.encode())


def _connect(address: str, port: int, result: dict) -> None:
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_SECONDS) as connection:
            own = connection.getsockname()[0]
            result.update(own=own, interface=_interface_of(own), peer=connection.getpeername()[0])
            result["token"] = connection.recv(200).decode(errors="replace")
    except OSError as error:
        # A time-out has no error number.
        result["error"] = error.strerror or f"no answer within {_CONNECT_SECONDS:g} s"


def _interface_of(address: str) -> str | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(trial.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _owner_of(port: int) -> str | None:
    """Returns the id and command of the process that listens on a port.

    Returns None if no process listens on the port, or if this user may not see the process.
    """
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (_read(table) or "").splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{words[9]}]")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                if _link(f"/proc/{pid}/fd/{descriptor}") in inodes:
                    command = (_read(f"/proc/{pid}/cmdline") or "").replace("\0", " ")
                    return f"process {pid} ({command[:60].strip()})"
    return None


def main() -> None:
    """Answers requests from standard input until standard input closes, then deletes the probe's test files."""
    probe = Probe()
    try:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            try:
                answer = {"answer": getattr(probe, request.pop("ask"))(**request)}
            except Exception as error:  # sent to the asking process, which adds this host's name
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(MARK + json.dumps(answer), flush=True)
    finally:
        probe.close()


if __name__ == "__main__":
    main()

"""Runs a server that forks Python processes with all imports done: 0.1 s in place of 5 s for `python -m`.

`start_module` replaces `python -m MODULE` in tests that need a separate process, but not a new interpreter. The forked
process runs the module as `__main__` in its main thread, and ends like an ordinary Python process.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import site
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]

# What every run imports sooner or later. DeepSpeed asks for its compiled operators with a compiler and imports torch's
# compiler with its first engine: two thirds of the time in which a rank starts. Segmentation's rank would import
# transformers and scipy for two seconds.
_MODULES = (
    "beit3_ds.train",
    "beit3_ds.training.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.pyplot",
    "scipy.optimize",
    "torchvision",
    "transformers.models.mask2former.modeling_mask2former",
    "tests.training.layouts",
)


class ModuleProcess:
    """Controls a process that the server forked, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status: int, stdout: IO[str] | None) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Returns the exit status, the negative signal number if a signal ended the process, or None while it runs."""
        return self._read_status(0)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the process; returns the exit status.

        Raises:
            subprocess.TimeoutExpired: if the process runs for `timeout` more seconds.
        """
        status = self._read_status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Waits for the end and returns the remaining output; kills the process after `timeout` seconds."""
        assert self.stdout is not None, "the output goes elsewhere"
        killer = threading.Timer(timeout, self.kill)
        killer.start()
        output = self.stdout.read()
        killer.cancel()
        self.stdout.close()
        self.wait(timeout)
        return output, None

    def send_signal(self, number: int) -> None:
        """Sends a signal unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may end between the two calls
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL unless the process has ended."""
        self.send_signal(signal.SIGKILL)

    def _read_status(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = _read_number(self._status)
            os.close(self._status)
        return self.returncode


def start_module(
    module: str,
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    output: int | IO[str] | None = None,
    passed: Sequence[int] = (),
    blocked: Iterable[int] = (),
) -> ModuleProcess:
    """Starts `python -m module arguments` in the current folder.

    Args:
        module: name of the module.
        arguments: command-line arguments of the module.
        env: the whole environment; None means the environment at the start of the server. Folders in PYTHONPATH are
            searched, and a `sitecustomize` in them is run. Variables that libraries read during import have no effect.
        output: where stdout and stderr go: `subprocess.PIPE`, a file, or None for the streams of this process.
        passed: file descriptors for the process; their numbers are appended to the arguments.
        blocked: signals that are blocked when the process begins.
    """
    pipe = output == subprocess.PIPE
    readable, writable = os.pipe() if pipe else (-1, os.dup(1) if output is None else os.dup(_number(output)))
    errors = os.dup(2) if output is None else os.dup(writable)
    status, told = os.pipe()
    request = {"module": module, "arguments": list(map(str, arguments)), "cwd": os.getcwd(), "env": env and dict(env)}
    request["blocked"] = list(map(int, blocked))
    fds = [told, writable, errors, *passed]
    try:
        socket.send_fds(_server(os.getpid()), [json.dumps(request).encode()], fds)
    finally:
        for fd in fds[:3]:
            os.close(fd)
    return ModuleProcess(_read_number(status), status, os.fdopen(readable) if pipe else None)


def _read_number(status: int) -> int:
    word = os.read(status, 8)
    assert word, "the server of preloaded processes has died"
    return int.from_bytes(word, "little", signed=True)


def _number(output: int | IO[str]) -> int:
    return output if isinstance(output, int) else output.fileno()


@cache
def _server(_pid: int) -> socket.socket:
    """Starts the server of this process; it ends when this process ends or closes the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno()), *_MODULES]
        subprocess.Popen(
            command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
    return ours


def _serve(server: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks a process per request; returns the request and its file descriptors in the forked process."""
    children: dict[int, tuple[int, int]] = {}  # by the descriptor that becomes readable at the end
    while True:
        ready, _, _ = select.select([server, *children], [], [])
        for ended in [fd for fd in ready if fd in children]:
            pid, told = children.pop(ended)
            os.close(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            _tell(told, code)
            os.close(told)
        if server not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(server, 1 << 20, 16)
        if not message:
            for pid, _ in children.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        told, *rest = fds
        request = json.loads(message)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, request["blocked"])  # a signal may come right after the fork
        pid = os.fork()
        if pid == 0:
            for fd in (*children, *(told for _, told in children.values()), told):
                os.close(fd)
            server.close()
            return request, rest
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        children[os.pidfd_open(pid)] = (pid, told)
        _tell(told, pid)
        for fd in rest:
            os.close(fd)


def _tell(told: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody may wait for this process any more
        os.write(told, number.to_bytes(8, "little", signed=True))


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Sets streams, environment, arguments and working folder of this process as requested."""
    import numpy as np

    for number, fd in enumerate(fds[:2], start=1):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if request["env"] is not None:
        os.environ.clear()
        os.environ.update(request["env"])
        _search(request["env"].get("PYTHONPATH", ""))
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])  # as `python -m` does
    importlib.invalidate_caches()
    random.seed()
    np.random.seed()
    sys.argv = [request["module"], *request["arguments"], *map(str, fds[2:])]
    sys.modules.pop(request["module"], None)  # it runs again, as `__main__`


def _search(folders: str) -> None:
    added = [folder for folder in folders.split(os.pathsep) if folder and folder not in sys.path]
    if added:
        sys.path[:0] = added
        importlib.invalidate_caches()
        sys.modules.pop("sitecustomize", None)
        site.execsitecustomize()


def _run(module: str) -> NoReturn:
    """Runs the module and ends like Python, but without freeing memory, which would take half a second."""
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def _preload(modules: Iterable[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    if "deepspeed" in sys.modules:
        assert sys.modules["deepspeed"].ops.__compatible_ops__  # asked for once, here
    gc.collect()
    gc.freeze()  # a collection in a forked process would write to every page, and so copy it


if __name__ == "__main__":
    _preload(sys.argv[2:])
    _request, _fds = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(_request, _fds)
    _run(_request["module"])

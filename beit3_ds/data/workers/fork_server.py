"""The server process from which worker processes are forked."""

import atexit
import multiprocessing
import os
import shutil
import signal
import tempfile
from multiprocessing import forkserver, resource_tracker

from beit3_ds.config import ConfigError

_SOCKET_NAME_BYTES = 107  # of an AF_UNIX address
_SOCKET_SUFFIX_BYTES = 40  # of multiprocessing's "/pymp-xxxxxxxx/listener-xxxxxxxx"
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def start_fork_server(preload: str) -> None:
    """Starts the server process from which workers are forked, if there is none; it and they block some signals.

    Plain fork would copy the locks of threads that exist by now, and CUDA does not survive it. Clusters send SIGTERM or
    SIGUSR1, and terminals SIGINT, to all processes of a run, to ask the ranks to end their step and save. Workers must
    survive these signals, because that step still needs them.
    """
    use_short_socket_folder()
    multiprocessing.get_context("forkserver").set_forkserver_preload([preload])  # once instead of by every worker
    resource_tracker.ensure_running()  # else the server starts it first, which unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})  # inherited
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def use_short_socket_folder() -> None:
    """Moves multiprocessing's sockets to a folder with a short name, if TMPDIR is too long for a socket's address."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # where its own folder is kept
    folder = settings.get("tempdir") or tempfile.gettempdir()
    if len(os.fsencode(folder)) + _SOCKET_SUFFIX_BYTES <= _SOCKET_NAME_BYTES:
        return
    short = tempfile.mkdtemp(prefix="b3-", dir=_find_short_folder())
    atexit.register(shutil.rmtree, short, ignore_errors=True)
    settings["tempdir"] = short


def _find_short_folder() -> str:
    for folder in _SHORT_FOLDERS:
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(
        f"TMPDIR={tempfile.gettempdir()} is too long for a socket's name, and none of {', '.join(_SHORT_FOLDERS)} can "
        "be written. Set TMPDIR to a shorter name."
    )

"""Starts the server process that forks the worker processes."""

import atexit
import multiprocessing
import os
import shutil
import signal
import tempfile
from multiprocessing import forkserver, resource_tracker

from beit3_ds.config import ConfigError

_SOCKET_NAME_BYTES = 107  # longest AF_UNIX address
_SOCKET_SUFFIX_BYTES = 40  # multiprocessing adds "/pymp-xxxxxxxx/listener-xxxxxxxx"
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}


def start_fork_server(preload: str) -> None:
    """Starts the server process that forks the worker processes; does nothing if the server is running.

    A direct fork of this process would copy locked locks and make CUDA unusable. The server and its workers block stop
    signals, because a rank needs its workers until the current step is finished.

    Args:
        preload: module that the server imports once for all workers.
    """
    use_short_socket_folder()
    multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
    resource_tracker.ensure_running()  # otherwise the server starts it, which unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # inherited
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def use_short_socket_folder() -> None:
    """Moves multiprocessing's sockets to a folder with a short path if TMPDIR is too long for socket addresses.

    Raises:
        ConfigError: if TMPDIR is too long and no other folder is writable.
    """
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # holds the folder of its sockets
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

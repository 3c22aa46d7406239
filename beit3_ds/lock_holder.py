"""Describes the process that holds a lock, as stored in the lock file."""

import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from beit3_ds.printing import printable
from beit3_ds.untrusted_json import check_count, check_object, check_text, parse_untrusted_json

_LONGEST_COMMAND = 200


class Holder(NamedTuple):
    """Describes the process that holds a lock, as stored in the lock file."""

    host: str
    pid: int
    since: str
    """Local time at which the process took the lock."""
    command: str
    boot: str
    """Boot ID of the process's host. Processes with equal boot IDs always see each other's locks."""
    is_stopping: bool
    """Whether the process has received a stop signal and will soon end."""

    def describe(self) -> str:
        """Returns a description of the process for messages, printable and of limited length."""
        command = printable(self.command, _LONGEST_COMMAND)
        return f"process {self.pid} on host {printable(self.host, 100)} ({command}), since {printable(self.since, 40)}"


def this_process(command: str | None) -> Holder:
    """Returns the description of this process. Assumes that no stop signal has arrived yet (`is_stopping` is False).

    Args:
        command: what the process does; None uses the process's command line.
    """
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=printable(_command_line() if command is None else command, _LONGEST_COMMAND),
        boot=_read_boot_id(),
        is_stopping=False,
    )


def describe_holder(holder: Holder | None) -> str:
    """Returns a description of a lock's holder for messages. None means that the lock file does not name the holder."""
    return "another process, which has not written its name" if holder is None else holder.describe()


def parse_holder(text: bytes) -> Holder | None:
    """Parses the content of a lock file, and returns None if it is invalid."""
    try:
        fields = check_object(parse_untrusted_json(text))
        return Holder(
            host=check_text(fields["host"]),
            pid=check_count(fields["pid"]),
            since=check_text(fields["since"]),
            command=check_text(fields["command"]),
            boot=check_text(fields["boot"]),
            is_stopping=fields["is_stopping"] is True,
        )
    except (ValueError, KeyError):
        return None


def _command_line() -> str:
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def _read_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

"""Connects to one node over ssh, starts the probe program there and sends questions to the probe."""

import asyncio
import contextlib
import json
import shlex
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3_ds.cluster.check import probe
from beit3_ds.cluster.hostfile import is_loopback

CONNECT_SECONDS = 5
"""Seconds that ssh waits for a node to accept a connection."""
ANSWER_SECONDS = 30.0
"""Default time limit for an answer in seconds; longer than the probe's own limit for nvidia-smi."""
_END_SECONDS = 2.0
_SHOWN = 1000  # characters; a longer argument is source, not a path
_LINE_BYTES = 1 << 24  # maximum bytes of an answer; the longest has digests of all files
_START = "import sys; n = int(sys.stdin.buffer.readline()); exec(compile(sys.stdin.buffer.read(n), 'probe', 'exec'))"


class NoAnswer(Exception):
    """Reports that a node did not answer.

    The message contains the reason and the last line that ssh or the node printed.
    """


def remote_command(name: str, argv: list[str], environment: Mapping[str, str]) -> list[str]:
    """Returns a local command that runs a program on a host, over ssh without prompts.

    If the host is localhost, the command runs the program directly.

    Args:
        name: name of the host.
        argv: program and its arguments, which are quoted for the remote shell.
        environment: environment variables to set for the program.
    """
    command = ["env", *(f"{key}={value}" for key, value in environment.items()), *argv]
    if is_loopback(name):
        return command
    options = ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}")
    return ["ssh", "-T", *(f"-o{option}" for option in options), name, f"exec {shlex.join(command)}"]


class NodeConnection:
    """Sends questions, one at a time, to a program on one node. The program is usually the probe.

    Other programs must answer in the same form as the probe.
    """

    def __init__(self, name: str, environment: Mapping[str, str], program: Path = Path(probe.__file__)) -> None:
        """Prepares a connection to a node; `start` opens the connection.

        Args:
            name: name of the host.
            environment: environment variables to set for the program on the node.
            program: source file of the program, which must have the protocol of `probe.main` and must not import
                beit3_ds.
        """
        self.name = name
        self._environment, self._program = environment, program
        self._process: asyncio.subprocess.Process | None = None
        self._last_lines: deque[str] = deque(maxlen=20)
        self._stderr_reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Opens the connection and sends the program to the node. Connection errors appear at the first `ask`.

        Raises:
            NoAnswer: if ssh is not installed on this machine.
        """
        command = remote_command(self.name, [sys.executable, "-u", "-c", _START], self._environment)
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LINE_BYTES
            )
        except FileNotFoundError:
            raise NoAnswer(f"cannot be reached: there is no program '{command[0]}' here") from None
        self._stderr_reader = asyncio.create_task(self._read_stderr())
        source = self._program.read_bytes()
        self._send(f"{len(source)}\n".encode() + source)

    async def ask(self, question: str, seconds: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """Sends a question to the program on the node and returns the answer.

        Args:
            question: name of a method of `Probe`, or another request that the program accepts.
            seconds: time limit for the answer in seconds.
            **arguments: arguments of the method.

        Raises:
            NoAnswer: if no answer arrives in time, the connection is lost, or the program reports an error.
        """
        assert self._process is not None and self._process.stdout is not None, "the connection was not started"
        self._send(json.dumps({"ask": question, **arguments}).encode() + b"\n")
        try:
            line = await asyncio.wait_for(self._next_answer(), seconds)
        except TimeoutError:
            short = {key: value for key, value in arguments.items() if isinstance(value, str) and len(value) < _SHOWN}
            about = ", ".join(f"{key}={value}" for key, value in short.items())
            raise NoAnswer(
                f"did not answer '{question}'{f' ({about})' if about else ''} within {seconds:g} s; {self._last_line()}"
            ) from None
        if line is None:
            raise NoAnswer(await self._why_closed())
        answer = json.loads(line)
        if "error" in answer:
            raise NoAnswer(f"could not answer '{question}': {answer['error']}")
        return answer["answer"]

    async def close(self) -> None:
        """Closes the connection. If the local ssh process hangs, kills it.

        When the connection closes, the probe deletes its test file and exits.
        """
        if self._process is None:
            return
        assert self._process.stdin is not None and self._stderr_reader is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._stderr_reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._stderr_reader

    def _send(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # the answer will be missing, which is an error with its reason
            self._process.stdin.write(data)

    async def _next_answer(self) -> str | None:
        assert self._process is not None and self._process.stdout is not None
        mark = probe.MARK.encode()
        async for line in self._process.stdout:
            if line.startswith(mark):
                return line[len(mark) :].decode()
        return None

    async def _read_stderr(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode(errors="replace").strip()
            if text and not text.startswith("Warning: Permanently added"):
                self._last_lines.append(text)

    def _last_line(self) -> str:
        return f"its last line: {self._last_lines[-1]!r}" if self._last_lines else "it printed nothing"

    async def _why_closed(self) -> str:
        assert self._process is not None and self._stderr_reader is not None
        try:
            status = await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        except TimeoutError:
            return f"closed the connection; {self._last_line()}"
        with contextlib.suppress(TimeoutError):  # ssh's shared connection (ControlMaster) may keep the pipe open
            await asyncio.wait_for(asyncio.shield(self._stderr_reader), _END_SECONDS)
        if status == 255 and not is_loopback(self.name):
            return f"cannot be reached by ssh; {self._last_line()}"
        if status in (126, 127):
            return f"has no Python at {sys.executable}, where this machine has it; {self._last_line()}"
        return f"ended with status {status}; {self._last_line()}"

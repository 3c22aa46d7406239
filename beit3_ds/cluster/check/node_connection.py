"""A question and answer connection with one node: ssh, and behind it a probe that was sent along."""

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
"""How long ssh waits for a node to take its call."""
ANSWER_SECONDS = 30.0
"""How long a node may think about a question: longer than the probe waits for nvidia-smi."""
_END_SECONDS = 2.0
_SHOWN = 1000  # characters; a longer argument is source, not a path
_LINE_BYTES = 1 << 24  # of the longest answer: digests of all files
_START = "import sys; n = int(sys.stdin.buffer.readline()); exec(compile(sys.stdin.buffer.read(n), 'probe', 'exec'))"


class NoAnswer(Exception):
    """A node was asked and did not answer; the text says why, with the last words of ssh or of the node."""


def remote_command(name: str, argv: list[str], environment: Mapping[str, str]) -> list[str]:
    """The command of this machine that runs `argv` on a host: over ssh that never asks, or as it is on localhost.

    Args:
        name: of the host.
        argv: program and arguments, quoted here for the remote shell.
        environment: variables to set there.
    """
    command = ["env", *(f"{key}={value}" for key, value in environment.items()), *argv]
    if is_loopback(name):
        return command
    options = ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}")
    return ["ssh", "-T", *(f"-o{option}" for option in options), name, f"exec {shlex.join(command)}"]


class NodeConnection:
    """One node's probe, or another program that answers like it; one question at a time."""

    def __init__(self, name: str, environment: Mapping[str, str], program: Path = Path(probe.__file__)) -> None:
        """Nothing is started yet.

        Args:
            name: of the host.
            environment: variables of the program there.
            program: source that stands alone, reads requests and writes answers as `probe.main` does.
        """
        self.name = name
        self._environment, self._program = environment, program
        self._process: asyncio.subprocess.Process | None = None
        self._last_words: deque[str] = deque(maxlen=20)
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Calls the node and sends the program along; whether that worked shows in the first answer.

        Raises:
            NoAnswer: if this machine has no ssh.
        """
        command = remote_command(self.name, [sys.executable, "-u", "-c", _START], self._environment)
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LINE_BYTES
            )
        except FileNotFoundError:
            raise NoAnswer(f"cannot be reached: there is no program '{command[0]}' here") from None
        self._listener = asyncio.create_task(self._listen())
        source = self._program.read_bytes()
        self._send(f"{len(source)}\n".encode() + source)

    async def ask(self, question: str, seconds: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """Asks one question of `Probe`.

        Args:
            question: the name of its method, or what else the program takes.
            seconds: to wait for the answer.
            **arguments: of the method.

        Raises:
            NoAnswer: if none comes in time, or the node is gone, or its probe failed.
        """
        assert self._process is not None and self._process.stdout is not None, "the conversation was not started"
        self._send(json.dumps({"ask": question, **arguments}).encode() + b"\n")
        try:
            line = await asyncio.wait_for(self._next_answer(), seconds)
        except TimeoutError:
            short = {key: value for key, value in arguments.items() if isinstance(value, str) and len(value) < _SHOWN}
            about = ", ".join(f"{key}={value}" for key, value in short.items())
            raise NoAnswer(
                f"did not answer '{question}'{f' ({about})' if about else ''} within {seconds:g} s; {self._said()}"
            ) from None
        if line is None:
            raise NoAnswer(await self._why_gone())
        answer = json.loads(line)
        if "error" in answer:
            raise NoAnswer(f"could not answer '{question}': {answer['error']}")
        return answer["answer"]

    async def close(self) -> None:
        """Hangs up: the probe ends and deletes what it wrote. A process that does not end is killed."""
        if self._process is None:
            return
        assert self._process.stdin is not None and self._listener is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listener

    def _send(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # that the node is gone shows when it is listened to
            self._process.stdin.write(data)

    async def _next_answer(self) -> str | None:
        assert self._process is not None and self._process.stdout is not None
        mark = probe.MARK.encode()
        async for line in self._process.stdout:
            if line.startswith(mark):
                return line[len(mark) :].decode()
        return None

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode(errors="replace").strip()
            if text and not text.startswith("Warning: Permanently added"):
                self._last_words.append(text)

    def _said(self) -> str:
        return f"it said last: {self._last_words[-1]!r}" if self._last_words else "it said nothing"

    async def _why_gone(self) -> str:
        assert self._process is not None and self._listener is not None
        try:
            status = await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        except TimeoutError:
            return f"hung up; {self._said()}"
        with contextlib.suppress(TimeoutError):  # a master connection of ssh may keep its end open
            await asyncio.wait_for(asyncio.shield(self._listener), _END_SECONDS)
        if status == 255 and not is_loopback(self.name):
            return f"cannot be reached by ssh; {self._said()}"
        if status in (126, 127):
            return f"has no Python at {sys.executable}, where this machine has it; {self._said()}"
        return f"ended with status {status}; {self._said()}"

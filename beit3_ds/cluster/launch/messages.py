"""Defines the messages that `beit3 launch` (the supervisor) and guards exchange, as lines of JSON over TCP.

A guard is the parent process of one rank's training process, and starts any command that the supervisor sends. So each
side first proves that it knows a secret token, which is new for each start of the ranks. The token is in a file with
mode 0600 in the log folder. Later messages are neither encrypted nor signed.
"""

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

KEEPALIVE_INTERVAL = 1.0
"""Seconds between two keepalive messages in each direction."""
HANDSHAKE_BYTES = 1 << 10
"""Maximum bytes of a line from a peer that has not proved that it knows the token."""

_LONGEST_LINE = 16 << 20  # bytes; environments can be long
_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Register:
    """Tells `beit3 launch` that a rank's guard, the parent of the training process, is ready."""

    rank: int
    local_rank: int | None
    """Index of the rank within its host; None if the guard's environment variables do not contain the index. The guard
    is the parent of the rank's training process."""
    host: str
    """Host name that the guard's machine reports."""
    pid: int
    """Process id of the guard."""
    address: str
    """Address of the guard's host. It is the local address of the guard's connection to `beit3 launch`."""
    free_port: int
    """Port of the guard's host that was free when the guard registered."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Tells a guard to start the training process of its rank."""

    command: Sequence[str]
    environment: Mapping[str, str]
    """Environment variables for the training process. They are added to the guard's own variables, and replace those
    with the same names."""
    folder: str
    """Working directory of the training process."""
    log: str
    """Log file for the output of the training process."""
    send_output: bool
    """Whether the guard also sends the output of the training process to `beit3 launch`."""


@dataclass(frozen=True, kw_only=True)
class KeepAlive:
    """Tells the receiver that the sender is alive."""

    state: str = ""
    """State of the training process as a letter from /proc, such as T (stopped); empty without a process."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Carries a training process's output text from the guard to `beit3 launch`."""

    text: str


@dataclass(frozen=True, kw_only=True)
class LogError:
    """Tells `beit3 launch` that a training process's log file cannot be written; training continues."""

    error: str


@dataclass(frozen=True, kw_only=True)
class StopSignalReceived:
    """Tells `beit3 launch` that a rank's guard received a stop signal, for example from the cluster manager."""

    signal_number: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Tells `beit3 launch` that a training process and all its child processes have ended."""

    status: int | None
    """Exit status, or minus the number of the signal that killed the training process; None if the process never
    started."""
    lines: Sequence[str]
    """Last lines that the training process printed."""
    error: str = ""
    """Reason why the training process could not start; empty if the training process started."""


@dataclass(frozen=True, kw_only=True)
class SendSignal:
    """Tells a guard to send a signal to the training process of its rank."""

    signal_number: int


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Tells a guard to kill the training process of its rank and all child processes of the training process."""


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Tells a guard to exit, because this attempt to run the training is over."""


Message = Register | Start | KeepAlive | Output | LogError | StopSignalReceived | Ended | SendSignal | Kill | Leave

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (Register, Start, KeepAlive, Output, LogError, StopSignalReceived, Ended, SendSignal, Kill, Leave)
}


class ProtocolError(Exception):
    """Reports a peer that does not know the secret token, or that sends invalid messages."""


class HandshakeClosedError(ProtocolError):
    """Reports a peer that closed the connection during the handshake."""


def encode(message: Message) -> bytes:
    """Encodes a message as one line of JSON; newlines and other control characters are escaped."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Parses one line of JSON and returns the message.

    Raises:
        ProtocolError: if the line is not a valid message.
    """
    try:
        values = json.loads(line)
        kind = _KINDS[values.pop("kind")]
        if set(values) != {field.name for field in fields(kind)}:
            raise ProtocolError(f"a {kind.__name__} message with the fields {sorted(values)}")
        return kind(**values)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ProtocolError(f"an invalid message: {line[:80]!r}") from None


class Channel:
    """Sends and receives messages at one end of a connection between a guard and `beit3 launch`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.last_heard = time.monotonic()
        """Time of the peer's last message: seconds on the monotonic clock."""

    def send(self, message: Message) -> None:
        """Sends a message without waiting. Errors are ignored, because `last_heard` shows that a peer is lost."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> Message | None:
        """Returns the next message, or None if the connection is closed.

        Raises:
            ProtocolError: if the peer sends an invalid message.
        """
        try:
            line = await self._reader.readline()
        except OSError:
            return None
        except ValueError:  # raised by asyncio for a line that is too long
            raise ProtocolError(f"a line of more than {_LONGEST_LINE} bytes") from None
        if not line.endswith(b"\n"):
            return None
        self.last_heard = time.monotonic()
        return decode(line)

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()

    def abort(self) -> None:
        """Closes the connection at once. Messages that are still in the send buffer are lost."""
        self._writer.transport.abort()

    async def wait_closed(self) -> None:
        """Waits until the connection is closed. Without this wait, asyncio would print connection errors."""
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    @property
    def peer_address(self) -> str:
        """Returns the address of the peer, or "an unknown address" if the peer closed the connection too early."""
        return str((self._writer.get_extra_info("peername") or ["an unknown address"])[0])

    @property
    def local_address(self) -> str:
        """Returns the address of this end of the connection."""
        return str(self._writer.get_extra_info("sockname")[0])

    async def authenticate_guard(self, token: bytes) -> None:
        """Checks that a guard knows the token, and proves to the guard that this supervisor knows the token.

        Raises:
            ProtocolError: if the guard does not know the token.
        """
        ours = secrets.token_hex(16)
        self._writer.write(f"{ours}\n".encode())
        theirs, proof = await self._word(), await self._word()
        if not hmac.compare_digest(proof, _proof(token, "guard", ours, theirs)):
            raise ProtocolError("it does not have the token of this attempt")
        self._writer.write(f"{_proof(token, 'supervisor', ours, theirs)}\n".encode())
        self._reader._limit = _LONGEST_LINE  # type: ignore[attr-defined] # asyncio has no public way to raise it

    async def authenticate_supervisor(self, token: bytes) -> None:
        """Proves to a supervisor that this guard knows the token, and checks that the supervisor knows the token.

        Raises:
            HandshakeClosedError: if the supervisor closed the connection, because this guard's token is wrong or
                because too many peers wait.
            ProtocolError: if the supervisor does not know the token.
        """
        ours, theirs = secrets.token_hex(16), await self._word()
        self._writer.write(f"{ours}\n{_proof(token, 'guard', theirs, ours)}\n".encode())
        if not hmac.compare_digest(await self._word(), _proof(token, "supervisor", theirs, ours)):
            raise ProtocolError("it does not have the token of this attempt")

    async def _word(self) -> str:
        try:
            line = await asyncio.wait_for(self._reader.readline(), _HANDSHAKE_SECONDS)
        except (ValueError, TimeoutError):
            raise ProtocolError("it sent an invalid handshake") from None
        except OSError:
            line = b""
        if not line:
            raise HandshakeClosedError("it closed the connection during the handshake")
        if not line.endswith(b"\n") or not line.isascii():
            raise ProtocolError("it sent an invalid handshake")
        return line.decode().strip()


async def connect(address: str, port: int) -> Channel:
    """Connects a guard to `beit3 launch` and returns the channel.

    Raises:
        OSError: if the connection fails.
    """
    return Channel(*await asyncio.open_connection(address, port, limit=_LONGEST_LINE))


def write_token(path: Path) -> bytes:
    """Creates a random token, writes it to a new file that only this user can read, and returns the token."""
    token = secrets.token_hex(32).encode()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())  # so that other machines see it
    return token


def _proof(token: bytes, who: str, supervisors: str, guards: str) -> str:
    return hmac.new(token, f"{who} {supervisors} {guards}".encode(), "sha256").hexdigest()

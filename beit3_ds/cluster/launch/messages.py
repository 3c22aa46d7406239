"""What the supervisor of a run and the guards of its ranks say to each other over TCP: one JSON object a line.

Both prove first that they can read the token of this attempt, a file of mode 0600 in the shared log folder: a guard
starts what its supervisor says, so neither may be anybody else. What follows is neither encrypted nor signed.
"""

import asyncio
import hmac
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

BEAT_SECONDS = 1.0
"""Between two heartbeats, either way."""

_LONGEST_LINE = 16 << 20  # bytes; environments can be long
_HANDSHAKE_SECONDS = 10.0
_BACKLOG = 1024  # guards that may come at the same moment


@dataclass(frozen=True, kw_only=True)
class Register:
    """Guard: here I am."""

    rank: int
    local_rank: int | None
    """Among the ranks of its host, as far as the launcher says."""
    host: str
    """As the host calls itself."""
    pid: int
    address: str
    """Of this host on the network over which it reached the supervisor."""
    free_port: int
    """On this host a moment ago."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Supervisor: start the trainer."""

    command: Sequence[str]
    environment: Mapping[str, str]
    """On top of what the launcher has set."""
    folder: str
    """To run in."""
    log: str
    """File for the trainer's output."""
    send_output: bool
    """Whether to send the output to the supervisor, too."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Either: I am alive."""

    state: str = ""
    """Letter of the trainer's state in /proc, from a guard whose trainer runs: T if it was stopped."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Guard: the trainer has printed this."""

    text: str


@dataclass(frozen=True, kw_only=True)
class LogTrouble:
    """Guard: the trainer's output cannot be written to its file; training goes on."""

    error: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Guard: somebody else than the supervisor has sent me this signal, the cluster's manager perhaps."""

    signal_number: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Guard: the trainer and all its processes are gone."""

    status: int | None
    """Exit status, or minus the signal that it died of; None if it was never started."""
    lines: Sequence[str]
    """Its last lines of output."""
    error: str = ""
    """Why it could not be started."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Supervisor: send this signal to the trainer."""

    signal_number: int


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Supervisor: end the trainer and all its processes at once."""


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Supervisor: the attempt is over."""


Message = Register | Start | Beat | Output | LogTrouble | Asked | Ended | Signal | Kill | Leave

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Register, Start, Beat, Output, LogTrouble, Asked, Ended, Signal, Kill, Leave)
}


Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ProtocolError(Exception):
    """The other side is not what it should be, in a few words."""


def encode(message: Message) -> bytes:
    """One line of JSON, whatever characters the message has."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of one line.

    Raises:
        ProtocolError: if it is none.
    """
    try:
        values = json.loads(line)
        kind = _KINDS[values.pop("kind")]
        if set(values) != {field.name for field in fields(kind)}:
            raise ProtocolError(f"a {kind.__name__} message with the fields {sorted(values)}")
        return kind(**values)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ProtocolError(f"no message: {line[:80]!r}") from None


class Channel:
    """One end of a connection between a guard and its supervisor."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.last_heard = time.monotonic()
        """When the other side last said something, on the clock of this one."""

    def send(self, message: Message) -> None:
        """Sends without waiting; what cannot be sent is lost, and shows in `last_heard`."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> Message | None:
        """The next message; None once the connection is gone.

        Raises:
            ProtocolError: if the other side sends something else.
        """
        try:
            line = await self._reader.readline()
        except OSError:
            return None
        except ValueError:  # of asyncio, for a line beyond its limit
            raise ProtocolError(f"a line of more than {_LONGEST_LINE} bytes") from None
        if not line.endswith(b"\n"):
            return None
        self.last_heard = time.monotonic()
        return decode(line)

    async def flush(self) -> None:
        """Waits until what was sent has left, or cannot."""
        try:
            await asyncio.wait_for(self._writer.drain(), BEAT_SECONDS)
        except (OSError, TimeoutError):
            return

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()

    @property
    def local_address(self) -> str:
        """Of this machine, as the connection uses it."""
        return str(self._writer.get_extra_info("sockname")[0])

    async def greet_guard(self, token: bytes) -> None:
        """On the supervisor: proves to a guard who this is, and lets it do so.

        Raises:
            ProtocolError: if it does not have the token.
        """
        ours = secrets.token_hex(16)
        self._writer.write(f"{ours}\n".encode())
        theirs, proof = await self._word(), await self._word()
        if not hmac.compare_digest(proof, _proof(token, "guard", ours, theirs)):
            raise ProtocolError("it does not have the token of this attempt")
        self._writer.write(f"{_proof(token, 'supervisor', ours, theirs)}\n".encode())

    async def greet_supervisor(self, token: bytes) -> None:
        """On a guard: the same.

        Raises:
            ProtocolError: if what answers does not have the token.
        """
        ours, theirs = secrets.token_hex(16), await self._word()
        self._writer.write(f"{ours}\n{_proof(token, 'guard', theirs, ours)}\n".encode())
        if not hmac.compare_digest(await self._word(), _proof(token, "supervisor", theirs, ours)):
            raise ProtocolError("it does not have the token of this attempt")

    async def _word(self) -> str:
        try:
            line = await asyncio.wait_for(self._reader.readline(), _HANDSHAKE_SECONDS)
        except (OSError, ValueError, TimeoutError):
            line = b""
        if not line.endswith(b"\n") or not line.isascii():
            raise ProtocolError("it does not speak as it should")
        return line.decode().strip()


async def connect(address: str, port: int) -> Channel:
    """Connects to a supervisor.

    Raises:
        OSError: if nothing answers.
    """
    return Channel(*await asyncio.open_connection(address, port, limit=_LONGEST_LINE))


async def listen(address: str, port: int, accept: Accept) -> asyncio.Server:
    """Listens for guards; `accept` makes a `Channel` of what it is given. Port 0 is any free one.

    Raises:
        OSError: if this machine does not have the address, or the port is taken.
    """
    return await asyncio.start_server(accept, address, port, limit=_LONGEST_LINE, backlog=_BACKLOG)


def write_token(path: Path) -> bytes:
    """Makes a token that only this user can read."""
    token = secrets.token_hex(32).encode()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())  # it must be there on the other machines, too
    return token


def _proof(token: bytes, who: str, supervisors: str, guards: str) -> str:
    return hmac.new(token, f"{who} {supervisors} {guards}".encode(), "sha256").hexdigest()

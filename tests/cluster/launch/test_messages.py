"""Tests that messages arrive unchanged, and only between peers with the same token."""

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.cluster.launch.listener import Listener
from beit3_ds.cluster.launch.messages import (
    Channel,
    Ended,
    KeepAlive,
    Kill,
    Leave,
    LogError,
    Message,
    Output,
    ProtocolError,
    Register,
    SendSignal,
    Start,
    StopSignalReceived,
    connect,
    decode,
    encode,
    write_token,
)

TEXT = st.text(st.characters(codec="utf-8"))
NUMBER = st.integers(0, 1 << 40)
MESSAGES = st.one_of(
    st.builds(
        Register,
        rank=NUMBER,
        local_rank=st.none() | NUMBER,
        host=TEXT,
        pid=NUMBER,
        address=TEXT,
        free_port=NUMBER,
    ),
    st.builds(
        Start,
        command=st.lists(TEXT),
        environment=st.dictionaries(TEXT, TEXT),
        folder=TEXT,
        log=TEXT,
        send_output=st.booleans(),
    ),
    st.builds(KeepAlive, state=TEXT),
    st.builds(Output, text=TEXT),
    st.builds(LogError, error=TEXT),
    st.builds(StopSignalReceived, signal_number=NUMBER),
    st.builds(Ended, status=st.none() | st.integers(-64, 255), lines=st.lists(TEXT), error=TEXT),
    st.builds(SendSignal, signal_number=NUMBER),
    st.sampled_from([Kill(), Leave()]),
)


@given(MESSAGES)
def test_messages_come_back(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")  # catches texts that would be two messages
    assert decode(line) == message


@given(st.binary() | st.recursive(st.none() | st.integers() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x)))
def test_anything_else_is_refused(value: object) -> None:
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(ProtocolError):
        decode(line)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ProtocolError, match="KeepAlive message with the fields"):
        decode(b'{"kind": "KeepAlive", "state": "", "more": 1}')


def greet(tokens: tuple[bytes, bytes]) -> list[str]:
    """Lets a supervisor and a guard greet each other; returns the error of each."""

    async def run() -> list[str]:
        complaints = []
        done = asyncio.Event()

        async def serve(channel: Channel) -> None:
            try:
                await channel.authenticate_guard(tokens[0])
            except ProtocolError as error:
                complaints.append(f"supervisor: {error}")
            done.set()

        listener = Listener(serve)
        channel = await connect("127.0.0.1", await listener.listen("127.0.0.1", 0))
        try:
            await channel.authenticate_supervisor(tokens[1])
        except ProtocolError as error:
            complaints.append(f"guard: {error}")
        await done.wait()
        channel.close()
        await listener.close()
        return complaints

    return asyncio.run(run())


def test_both_sides_prove_themselves() -> None:
    assert greet((b"a" * 64, b"a" * 64)) == []
    assert greet((b"a" * 64, b"b" * 64)) == [
        "supervisor: it does not have the token of this attempt",
        "guard: it closed the connection during the handshake",
    ]


def test_a_guard_trusts_no_supervisor_without_the_token() -> None:
    """Catches a guard that starts any command that arrives at its port."""

    async def run() -> None:
        async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"00\n")
            await reader.readline()
            proof = await reader.readline()  # what the guard itself has just said
            writer.write(proof)

        server = await asyncio.start_server(pretend, "127.0.0.1", 0)
        channel = await connect("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(ProtocolError, match="does not have the token"):
            await channel.authenticate_supervisor(b"a" * 64)
        channel.close()
        server.close()

    asyncio.run(run())


def test_a_peer_without_the_token_is_not_read_on() -> None:
    """Catches a buffer of 16 MiB for each unknown peer; a peer with the token may send long messages."""

    async def run() -> None:
        received: asyncio.Queue[Message | None] = asyncio.Queue()
        errors: asyncio.Queue[str] = asyncio.Queue()

        async def serve(channel: Channel) -> None:
            try:
                await channel.authenticate_guard(b"a" * 64)
                received.put_nowait(await channel.receive())
            except ProtocolError as error:
                errors.put_nowait(str(error))

        listener = Listener(serve)
        port = await listener.listen("127.0.0.1", 0)
        _, stranger = await asyncio.open_connection("127.0.0.1", port)
        stranger.write(b"0" * 4096)  # and no end of the line
        assert await asyncio.wait_for(errors.get(), 5) == "it sent an invalid handshake"
        guard = await connect("127.0.0.1", port)
        await guard.authenticate_supervisor(b"a" * 64)
        guard.send(Output(text="x" * (1 << 20)))
        assert await asyncio.wait_for(received.get(), 20) == Output(text="x" * (1 << 20))
        stranger.close()
        guard.close()
        await listener.close()

    asyncio.run(run())


def test_a_token_is_for_its_owner(tmp_path: Path) -> None:
    token = write_token(tmp_path / "token")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "token").read_bytes() == token != write_token(tmp_path / "other")
    with pytest.raises(FileExistsError):
        write_token(tmp_path / "token")

"""Tests that a listener serves each connection, and ends all of them without a word when it closes."""

import asyncio

import pytest

from beit3_ds.cluster.launch.listener import Listener
from beit3_ds.cluster.launch.messages import Channel, connect


def test_a_connection_ends_with_its_task() -> None:
    async def serve(channel: Channel) -> None:
        await channel.receive()

    async def run() -> None:
        listener = Listener(serve)
        port = await listener.listen("127.0.0.1", 0)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        reader, other = await asyncio.open_connection("127.0.0.1", port)
        other.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b""  # closed, though the first connection is open
        other.close()
        writer.close()
        await listener.close()

    asyncio.run(run())


def test_waiting_peers_end_silently_with_the_listener(capfd: pytest.CaptureFixture[str]) -> None:
    """Catches tasks of asyncio's own server, which print a traceback when the event loop ends."""
    began = asyncio.Event()

    async def serve(channel: Channel) -> None:
        began.set()
        await channel.authenticate_guard(b"a" * 64)

    async def run() -> None:
        listener = Listener(serve)
        port = await listener.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await began.wait()
        await listener.close()
        await asyncio.wait_for(reader.read(), 5)
        assert reader.at_eof()  # the peer's connection is closed
        with pytest.raises(ConnectionRefusedError):
            await connect("127.0.0.1", port)
        writer.close()

    asyncio.run(run())
    assert capfd.readouterr().err == ""

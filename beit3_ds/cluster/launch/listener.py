"""Accepts the guards' connections to `beit3 launch`, and serves each connection in a task."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from beit3_ds.cluster.launch.messages import HANDSHAKE_BYTES, Channel

_BACKLOG = 1024  # guards that may connect at the same moment
_ACCEPTED_AT_ONCE = 32  # connections accepted in one go; each needs a file descriptor


class Listener:
    """Accepts connections at one port, and runs a task for each connection until the task or the listener ends.

    The listener creates and ends these tasks itself. The tasks of asyncio's own server print a traceback if they still
    run when the program ends.
    """

    def __init__(self, serve: Callable[[Channel], Coroutine[Any, Any, None]]) -> None:
        """Creates a listener that does not listen yet.

        Args:
            serve: coroutine function that is called with the channel of each new connection. The channel is closed
                when the function returns.
        """
        self._serve = serve
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, address: str, port: int) -> int:
        """Starts to listen, and returns the port.

        Args:
            address: address of this machine.
            port: port to listen on; 0 means any free port.

        Raises:
            OSError: if this machine does not have the address, or the port is taken.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.create_server((address, port), family=family)
        self._server = await asyncio.start_server(
            self._accept, sock=listening, limit=HANDSHAKE_BYTES, backlog=_ACCEPTED_AT_ONCE
        )
        listening.listen(
            _BACKLOG
        )  # `start_server` uses one number for the backlog and for connections accepted at once
        return int(listening.getsockname()[1])

    def stop_accepting(self) -> None:
        """Stops listening. Open connections stay open."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Stops listening, closes all connections and waits until their tasks have ended."""
        self.stop_accepting()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        task = asyncio.create_task(self._serve(channel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: channel.close())  # also if the task was cancelled before it began

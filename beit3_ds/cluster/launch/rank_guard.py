"""Guards one rank. On every host, DeepSpeed's launcher starts guards instead of training processes.

A guard connects to `beit3 launch`, runs the training process as its child, and reports how that process ends. The guard
kills the training process on request, or after `keepalive_seconds` without a message. If the connection closes, the
guard sends SIGTERM to the training process, which then has `keepalive_seconds` to save. A guard starts fast, because it
imports neither torch nor DeepSpeed.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

from beit3_ds.cluster.launch.messages import (
    KEEPALIVE_INTERVAL,
    Channel,
    Ended,
    HandshakeClosedError,
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
)
from beit3_ds.cluster.launch.trainer_process import TrainerProcess
from beit3_ds.retrying.standard_streams import keep_standard_streams
from beit3_ds.runtime.stop_signals import handled_signals

# Variables that launchers set: DeepSpeed, Open MPI, MPICH, Slurm.
_RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL_RANK_NAMES = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
)
_ATTEMPTS = 4


class RankGuard:
    """Starts, signals and kills one rank's training process for `beit3 launch`, and reports how the process ends."""

    def __init__(self, channel: Channel, keepalive_seconds: float) -> None:
        """Creates the guard of this process. The process must already have registered with `beit3 launch` over
        `channel`.

        Args:
            channel: connection to `beit3 launch`.
            keepalive_seconds: seconds without a message after which the guard regards `beit3 launch` as lost.
        """
        self._channel, self._keepalive = channel, keepalive_seconds
        self._trainer: TrainerProcess | None = None
        self._has_ended = False
        self._is_lost = False
        self._over = asyncio.Event()

    async def run(self) -> int:
        """Runs until `beit3 launch` tells the guard to exit.

        If `beit3 launch` is lost, runs until the training process has ended.

        Returns:
            Exit status: 0 if `beit3 launch` told the guard to exit, 1 if `beit3 launch` was lost.
        """
        loop = asyncio.get_running_loop()
        for number in handled_signals():
            loop.add_signal_handler(number, self._channel.send, StopSignalReceived(signal_number=number))
        tasks = [loop.create_task(self._receive_messages()), loop.create_task(self._send_keepalives())]
        await self._over.wait()
        for task in tasks:
            task.cancel()
        return 1 if self._is_lost else 0

    async def _receive_messages(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                self._handle(message)
        except ProtocolError as error:
            print(f"beit3 launch: the supervisor sent {error}", file=sys.stderr, flush=True)
        if self._over.is_set():
            return
        self._is_lost = True
        if self._trainer is None or self._has_ended:
            self._over.set()
        else:  # the trainer has `keepalive_seconds` to save
            self._trainer.send_signal(signal.SIGTERM)

    def _handle(self, message: Message) -> None:
        match message:
            case Start():
                self._start(message)
            case SendSignal(signal_number=number) if self._trainer is not None and not self._has_ended:
                self._trainer.send_signal(number)
            case Kill():
                self._kill()
            case Leave():
                self._over.set()

    def _start(self, start: Start) -> None:
        if self._has_ended:
            return
        loop = asyncio.get_running_loop()

        def send(message: Message) -> None:  # called by the thread that copies the output
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._channel.send, message)

        try:
            self._trainer = TrainerProcess(
                start,
                (lambda text: send(Output(text=text))) if start.send_output else None,
                lambda error: send(LogError(error=error)),
            )
        except (OSError, ValueError) as error:
            self._has_ended = True
            self._channel.send(Ended(status=None, lines=[], error=f"cannot start {start.command[0]}: {error}"))
            return
        loop.add_reader(self._trainer.pidfd, self._report_end, self._trainer)

    def _kill(self) -> None:
        if self._trainer is None and not self._has_ended:
            self._has_ended = True  # the trainer was never started
            self._channel.send(Ended(status=None, lines=[]))
        elif self._trainer is not None and not self._has_ended:
            self._trainer.kill()

    def _report_end(self, trainer: TrainerProcess) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(trainer.pidfd)
        self._has_ended = True
        finished = loop.run_in_executor(None, trainer.finish)  # waits for the last output

        def report(status: "asyncio.Future[int]") -> None:
            self._channel.send(Ended(status=status.result(), lines=trainer.last_lines()))
            if self._is_lost:
                self._over.set()

        finished.add_done_callback(report)

    async def _send_keepalives(self) -> None:
        while True:
            before = time.monotonic()
            state = "" if self._trainer is None or self._has_ended else self._trainer.state()
            self._channel.send(KeepAlive(state=state))
            await asyncio.sleep(KEEPALIVE_INTERVAL)
            # While this process was stopped, messages of the supervisor may have arrived unread.
            self._channel.last_heard += max(0.0, time.monotonic() - before - 2 * KEEPALIVE_INTERVAL)
            if time.monotonic() - self._channel.last_heard > self._keepalive:
                self._is_lost = True
                if self._trainer is None or self._has_ended:
                    self._over.set()
                else:
                    self._trainer.kill()


def main() -> int:
    """Reads the rank from the launcher's environment variables and runs the rank's guard; returns the exit status."""
    keep_standard_streams()  # the launcher that reads them may have ended
    parser = argparse.ArgumentParser(prog="beit3_ds.cluster.launch.rank_guard", description=__doc__)
    parser.add_argument("--address", required=True, help="address of the supervisor")
    parser.add_argument("--port", required=True, type=int, help="port of the supervisor")
    parser.add_argument(
        "--token", required=True, type=_decode_path, metavar="HEX", help="path of a file that both sides must read"
    )
    parser.add_argument(
        "--keepalive", required=True, type=float, metavar="SECONDS", help="silence after which the supervisor is lost"
    )
    options = parser.parse_args()
    try:
        return asyncio.run(_guard(options))
    except (OSError, ProtocolError) as error:
        print(f"beit3 launch: {error}", file=sys.stderr, flush=True)
        return 1


async def _guard(options: argparse.Namespace) -> int:
    rank = _number(_RANK_NAMES)
    if rank is None:
        raise ProtocolError(f"the launcher has set none of {', '.join(_RANK_NAMES)}")
    who = f"rank {rank} on host {socket.gethostname()}"
    try:
        token = await _read(options.token)
    except OSError as error:
        raise OSError(
            f"{who} cannot read {options.token}: {error.strerror}. The log folder must be on storage that all hosts "
            "share: name one with --log-dir."
        ) from None
    where = f"the supervisor at {options.address} port {options.port}"
    try:
        channel = await _connect(options.address, options.port, token)
    except OSError as error:
        raise OSError(
            f"{who} cannot reach {where}: {error.strerror}. Let the hosts connect to that port (--port names it)."
        ) from None
    except ProtocolError as error:
        raise ProtocolError(f"{who} does not trust {where}: {error}") from None
    channel.send(
        Register(
            rank=rank,
            local_rank=_number(_LOCAL_RANK_NAMES),
            host=socket.gethostname(),
            pid=os.getpid(),
            address=channel.local_address,
            free_port=_free_port(),
        )
    )
    return await RankGuard(channel, options.keepalive).run()


async def _read(path: Path) -> bytes:
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):  # a network file system may show a new file late
            return path.read_bytes()
        await asyncio.sleep(KEEPALIVE_INTERVAL)
    return path.read_bytes()


async def _connect(address: str, port: int, token: bytes) -> Channel:
    """Connects to `beit3 launch`, and tries again after a failure.

    A connection may fail because `beit3 launch` keeps only a limited number of new connections (`WaitingPeers`).
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(OSError, HandshakeClosedError):
            return await _connect_once(address, port, token)
        await asyncio.sleep(KEEPALIVE_INTERVAL)
    return await _connect_once(address, port, token)


async def _connect_once(address: str, port: int, token: bytes) -> Channel:
    channel = await connect(address, port)
    try:
        await channel.authenticate_supervisor(token)
    except ProtocolError:
        channel.close()
        raise
    return channel


def _decode_path(text: str) -> Path:
    return Path(os.fsdecode(bytes.fromhex(text)))


def _number(names: tuple[str, ...]) -> int | None:
    found = (os.environ[name] for name in names if re.fullmatch("[0-9]{1,9}", os.environ.get(name, "")))
    return next(map(int, found), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())

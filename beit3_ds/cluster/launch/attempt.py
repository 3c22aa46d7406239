"""Runs one attempt at a run: starts DeepSpeed's launcher, and supervises all ranks until they have ended."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable

from beit3_ds.cluster.launch.attempt_plan import AttemptPlan, Outcome
from beit3_ds.cluster.launch.guarded_rank import AttemptFailure, GuardedRank, describe_status, select_explanation
from beit3_ds.cluster.launch.launcher_command import LAUNCHER_FOLDER, guard_arguments
from beit3_ds.cluster.launch.launcher_process import LauncherProcess
from beit3_ds.cluster.launch.listener import Listener
from beit3_ds.cluster.launch.messages import (
    KEEPALIVE_INTERVAL,
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
    write_token,
)
from beit3_ds.cluster.launch.stop_signals import LauncherStopSignals
from beit3_ds.cluster.launch.terminal import Terminal, last_lines
from beit3_ds.cluster.launch.waiting_peers import WaitingPeers
from beit3_ds.rank_names import join_ranks
from beit3_ds.runtime.run_secret import SECRET_VARIABLE
from beit3_ds.runtime.stop_signals import STOP_SIGNALS, exit_status

USER_ERROR = 2
"""Exit status of a training process that failed because of a user's mistake."""

_STRANGERS = 64  # connections that may wait without the token, besides one per rank
_SETTLE_SECONDS = 0.5  # wait after the first reported failure, because the cause may be reported later
_SILENCE_SECONDS = 4 * KEEPALIVE_INTERVAL  # silence after which the message about a failure names a rank
_GRACE_SECONDS = 5.0  # time in which the other ranks end after a failure and report it (`runtime.watchdog`)
_LAUNCHER_SECONDS = 10.0  # time for DeepSpeed's launcher to end once all guards have left
_SHORT_LAUNCHER_SECONDS = 2.0  # limit after a stop signal, or if a host is lost: pdsh and mpirun would wait
_NOTICE_SECONDS = 15.0  # interval of messages about missing ranks


class Attempt:
    """Supervises one attempt at a run: starts the ranks on all hosts, watches the ranks and ends them."""

    def __init__(self, plan: AttemptPlan, stop_signals: LauncherStopSignals, terminal: Terminal) -> None:
        self._plan, self._stop_signals, self._terminal = plan, stop_signals, terminal
        self._ranks: dict[int, GuardedRank] = {}
        self._failures: list[AttemptFailure] = []
        self._failure: AttemptFailure | None = None
        self._changed = asyncio.Event()
        self._has_started = self._is_over = self._is_stop_forwarded = False
        self._began = time.monotonic()
        self._token = b""
        self._waiting = WaitingPeers(plan.world_size + _STRANGERS)
        stop_signals.on_change = self._forward_stop_signal

    async def run(self) -> Outcome:
        """Runs the attempt until all ranks have ended, and returns the outcome.

        Raises:
            OSError: if the log folder cannot be written, if the port is taken, or if DeepSpeed's launcher is not
                installed.
        """
        plan = self._plan
        token_path = plan.log_dir / "token"
        self._token = write_token(token_path)
        listener = Listener(self._serve)
        port = await listener.listen(plan.address, plan.port)
        commands = plan.build_commands(guard_arguments(plan.address, port, token_path, plan.keepalive_seconds))
        launcher = LauncherProcess(commands, plan.launcher_environment, LAUNCHER_FOLDER, plan.log_dir / "launcher.log")
        keepalives = asyncio.create_task(self._send_keepalives(launcher))
        keepalives.add_done_callback(self._check_keepalives)
        try:
            await self._wait_for_guards(launcher)
            if not self._failures and self._stop_signals.first is None:
                self._start_trainers()
                await self._wait_for_end()
            if self._failures:
                await asyncio.sleep(_SETTLE_SECONDS)
                self._print_failure()
            await self._end_ranks()
        finally:
            self._is_over = True
            for rank in self._ranks.values():
                rank.channel.send(Leave())
            keepalives.cancel()
            listener.stop_accepting()
            is_short = self._stop_signals.first is not None or any(rank.is_lost for rank in self._ranks.values())
            await launcher.end(_SHORT_LAUNCHER_SECONDS if is_short else _LAUNCHER_SECONDS)
            await listener.close()
            token_path.unlink(missing_ok=True)
        self._print_ends()
        return self._outcome()

    # Messages of guards.

    async def _serve(self, channel: Channel) -> None:
        self._waiting.add(channel)
        try:
            try:
                await channel.authenticate_guard(self._token)
            finally:
                self._waiting.remove(channel)
            message = await channel.receive()
            if not isinstance(message, Register):
                raise ProtocolError("it did not register")
            rank = self._register(message, channel)
        except ProtocolError as error:
            if line := self._waiting.describe_refusal(channel, str(error)):
                self._terminal.report(line)
            channel.abort()
            await channel.wait_closed()
            return
        try:
            while (message := await channel.receive()) is not None:
                self._handle(rank, message)
        except ProtocolError as error:
            self._terminal.report(f"the guard of {rank.name} sent {error}")
        if not rank.is_gone and not self._is_over:
            rank.is_lost = True
            self._fail(
                rank.failure(
                    f"lost its guard (process {rank.registered.pid}), which ends the rank: the guard was killed, or "
                    "the host went down"
                )
            )

    def _register(self, message: Register, channel: Channel) -> GuardedRank:
        if not 0 <= message.rank < self._plan.world_size or message.rank in self._ranks:
            raise ProtocolError(f"rank {message.rank} of {self._plan.world_size} is not expected from {message.host}")
        log = self._plan.log_dir / f"rank_{message.rank}.log"
        rank = self._ranks[message.rank] = GuardedRank(registered=message, channel=channel, log=log)
        if self._is_over:
            channel.send(Leave())
        self._changed.set()
        return rank

    def _handle(self, rank: GuardedRank, message: Message) -> None:
        match message:
            case KeepAlive():
                rank.record_state(message.state)
            case Output() if not self._failures:
                self._terminal.print_output(message.text)
            case LogError():
                self._terminal.report(
                    f"{rank.name}: its log misses lines until it can be written, training continues: {message.error}"
                )
            case StopSignalReceived() if not self._failures and not rank.is_gone:
                number = signal.Signals(message.signal_number)
                self._stop_signals.receive(number, f"{rank.name} has received {number.name}")
            case Ended():
                rank.ended = message
                self._changed.set()
                if self._is_failure(rank, message):
                    self._fail(rank.failure(rank.describe_end() + _hint(rank)))

    def _is_failure(self, rank: GuardedRank, ended: Ended) -> bool:
        stop = self._stop_signals.first
        is_stopped = stop is not None and ended.status in (None, -stop, *map(exit_status, STOP_SIGNALS))
        return not rank.is_killed and not is_stopped and ended.status != 0

    # The course of one start of the ranks.

    async def _wait_for_guards(self, launcher: LauncherProcess) -> None:
        """Waits until the guard of every rank has registered; stops waiting after a failure or a stop signal.

        A guard is the parent of a rank's training process. If guards do not register in time, the attempt fails.
        """

        def is_done() -> bool:
            everybody = len(self._ranks) == self._plan.world_size
            return everybody or bool(self._failures) or self._stop_signals.first is not None

        deadline = time.monotonic() + self._plan.start_seconds
        while not await self._wait(is_done, KEEPALIVE_INTERVAL):
            statuses = launcher.statuses()
            if (statuses is None and time.monotonic() < deadline) or await self._wait(is_done, KEEPALIVE_INTERVAL):
                continue
            missing = sorted(set(range(self._plan.world_size)) - set(self._ranks))
            hosts = ", ".join(dict.fromkeys(map(self._plan.host_of, missing)))
            what = (
                f"did not start within {self._plan.start_seconds:.0f} s"
                if statuses is None
                else f"did not start: DeepSpeed's launcher {describe_status(next(filter(None, statuses), 0))}"
            )
            text = f"{join_ranks(missing)} (host {hosts}) {what}"
            self._fail(AttemptFailure(text=text, lines=tuple(last_lines(launcher.log)), log=launcher.log))

    def _start_trainers(self) -> None:
        main = self._ranks[0].registered
        address = self._plan.address if main.address.startswith("127.") else main.address
        hosts: dict[str, list[int]] = {}
        for number in sorted(self._ranks):
            hosts.setdefault(self._ranks[number].registered.host, []).append(number)
        for number, rank in self._ranks.items():
            peers = hosts[rank.registered.host]
            local_rank = rank.registered.local_rank
            found = {
                "RANK": number,
                "LOCAL_RANK": peers.index(number) if local_rank is None else local_rank,
                "WORLD_SIZE": self._plan.world_size,
                "LOCAL_SIZE": len(peers),
                "MASTER_ADDR": address,
                "MASTER_PORT": main.free_port,
                SECRET_VARIABLE: self._plan.log_dir / "token",
            }
            rank.channel.send(
                Start(
                    command=list(self._plan.trainer),
                    environment={**{name: str(value) for name, value in found.items()}, **self._plan.environment},
                    folder=str(self._plan.folder),
                    log=str(rank.log),
                    send_output=number == 0,
                )
            )
        self._has_started = True
        self._terminal.report(f"started {len(self._ranks)} ranks on {', '.join(hosts)}; logs in {self._plan.log_dir}")
        self._forward_stop_signal()

    async def _wait_for_end(self) -> None:
        def is_done() -> bool:
            return bool(self._failures) or self._stop_signals.is_kill or not self._alive()

        while not await self._wait(is_done, _NOTICE_SECONDS):
            if self._stop_signals.first is not None:
                seconds = time.monotonic() - self._stop_signals.since
                self._terminal.report(
                    f"waiting for {join_ranks(self._alive())} to save and stop, since {seconds:.0f} s; they stop after "
                    "their current step, or before the first if they are still starting. Ctrl-C again kills them."
                )

    async def _end_ranks(self) -> None:
        """Waits a few seconds for the ranks to end, kills the ranks that still run, and waits at most
        `keepalive_seconds` for their end.
        """
        if not self._has_started:
            return
        await self._wait(lambda: self._stop_signals.is_kill or not self._alive(), _GRACE_SECONDS)
        for rank in self._alive().values():
            rank.is_killed = True
            rank.channel.send(Kill())
        if not await self._wait(lambda: not self._alive(), self._plan.keepalive_seconds):
            states = ", ".join(f"{rank.name} (state {rank.state or '?'})" for rank in self._alive().values())
            self._terminal.report(
                f"killed, but not gone: {states}. In state D the kernel waits for storage or a device and ends them "
                "once that answers; they do nothing more."
            )

    # Detection of failures.

    async def _send_keepalives(self, launcher: LauncherProcess) -> None:
        while True:
            before = time.monotonic()
            for rank in self._ranks.values():
                rank.channel.send(KeepAlive())
            launcher.watch()
            self._find_lost()
            await asyncio.sleep(KEEPALIVE_INTERVAL)
            late = max(0.0, time.monotonic() - before - 2 * KEEPALIVE_INTERVAL)
            for rank in self._ranks.values():  # unread messages may have arrived while this process was stopped
                rank.channel.last_heard += late

    def _check_keepalives(self, keepalives: "asyncio.Task[None]") -> None:
        if not keepalives.cancelled() and keepalives.exception() is not None:
            self._fail(AttemptFailure(text=f"the supervisor itself: {keepalives.exception()!r}"))

    def _find_lost(self) -> None:
        silent: dict[str, list[GuardedRank]] = {}
        for rank in self._ranks.values():
            if not rank.is_gone and rank.silence > self._plan.keepalive_seconds:
                silent.setdefault(rank.registered.host, []).append(rank)
            if rank.is_stopped():
                seconds = time.monotonic() - rank.state_since
                self._fail(rank.failure(f"has been stopped (state T) for {seconds:.0f} s: something sent it SIGSTOP"))
        for host, ranks in silent.items():
            for rank in ranks:
                rank.is_lost = True
            who = join_ranks(rank.rank for rank in ranks)
            seconds = self._plan.keepalive_seconds
            text = (
                f"host {host} ({who}) has been silent for {seconds:g} s: the host or its network is down, or its "
                f"guards are stopped; they end their ranks after {seconds:g} s of silence"
            )
            first = ranks[0]
            self._fail(AttemptFailure(text=text, lines=tuple(last_lines(first.log)), log=first.log, rank=first.rank))

    def _fail(self, failure: AttemptFailure) -> None:
        self._failures.append(failure)
        self._changed.set()

    def _print_failure(self) -> None:
        """Prints one failure, and the last output of the rank that failed.

        Chooses the first failure that cannot be a consequence of another. If every failure can be a consequence,
        chooses the first failure.
        """
        failure = self._failure = min(self._failures, key=lambda failure: failure.is_consequence)
        silent = [rank.name for rank in self._alive().values() if rank.silence > _SILENCE_SECONDS]
        hint = f"; silent for some seconds: {', '.join(silent)}" if silent and failure.is_consequence else ""
        where = f" (last lines of {failure.log})" if failure.lines else f" (see {failure.log})" if failure.log else ""
        seconds = time.monotonic() - self._began
        self._terminal.report(f"FAILED after {seconds:.0f} s: {failure.text}{hint}{where}", failure.lines)

    def _forward_stop_signal(self) -> None:
        """Forwards the first stop signal of this process to all running ranks, once."""
        self._changed.set()
        if self._has_started and self._stop_signals.first is not None and not self._is_stop_forwarded:
            self._is_stop_forwarded = True
            for rank in self._alive().values():
                rank.channel.send(SendSignal(signal_number=self._stop_signals.first))

    async def _wait(self, happened: Callable[[], bool], seconds: float) -> bool:
        """Waits at most `seconds` until `happened` returns true; returns the last result of `happened`."""
        deadline = time.monotonic() + seconds
        while not happened():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return True

    def _alive(self) -> dict[int, GuardedRank]:
        return {number: rank for number, rank in self._ranks.items() if not rank.is_gone}

    # The end of the ranks.

    def _print_ends(self) -> None:
        """Prints how the ranks ended. Ranks that ended in the same way share one line.

        The rank whose failure was already printed is left out.
        """
        if self._failure is None:
            return
        ends: dict[str, list[GuardedRank]] = {}
        for rank in self._ranks.values():
            if rank.rank != self._failure.rank and self._has_started:
                ends.setdefault(rank.describe_end(), []).append(rank)
        for end, ranks in ends.items():
            first = min(ranks, key=lambda rank: rank.rank)
            lines = first.ended.lines if first.ended is not None else []
            if len(ranks) > 1:
                end = end.replace("was ", "were ", 1)
            error = select_explanation(lines, otherwise=lines[-1:])[:1]
            self._terminal.report(f"{join_ranks(rank.rank for rank in ranks)} {end}", error)

    def _outcome(self) -> Outcome:
        lost = [rank for rank in self._ranks.values() if rank.is_lost]
        hosts = {self._host_name(rank) for rank in lost}
        if self._failures and not self._has_started:
            hosts |= {self._plan.host_of(rank) for rank in range(self._plan.world_size) if rank not in self._ranks}
        return Outcome(
            failure=self._failure,
            is_user_error=any(rank.ended and rank.ended.status == USER_ERROR for rank in self._ranks.values()),
            lost_hosts=frozenset(hosts),
            clear_at=max((rank.channel.last_heard + self._plan.keepalive_seconds for rank in lost), default=0.0),
        )

    def _host_name(self, rank: GuardedRank) -> str:
        """Returns the name of a rank's host as written in the hostfile, even if Slurm has reordered the hosts."""
        own = rank.registered.host.partition(".")[0]
        found = (host.name for host in self._plan.hosts if host.name.partition(".")[0] == own)
        return next(found, self._plan.host_of(rank.rank))


def _hint(rank: GuardedRank) -> str:
    if rank.ended is not None and rank.ended.status == -9:
        return f" (the kernel does that if memory runs out: see dmesg on {rank.registered.host})"
    return ""

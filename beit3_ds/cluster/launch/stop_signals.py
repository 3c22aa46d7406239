"""What signals to `beit3 launch` ask of a run: to save and stop, or to end at once."""

import asyncio
import signal
import time
from collections.abc import Callable

from beit3_ds.cluster.launch.terminal import Terminal


class LauncherStopSignals:
    """The first SIGTERM, SIGINT or SIGUSR1 is passed to all ranks; a second SIGINT kills them.

    SIGHUP, of a terminal that is closed, counts as SIGTERM. SIGTSTP (Ctrl-Z) is refused: ranks end when their
    supervisor is silent.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.first: signal.Signals | None = None
        """The signal that asked the run to stop, if any has."""
        self.since = 0.0
        """When that was, on the monotonic clock."""
        self.is_kill = False
        """Whether the ranks shall not even save."""
        self.on_change: Callable[[], None] = lambda: None
        """Called after every change."""

    def listen(self) -> None:
        """Takes the signals of this process, until its event loop ends."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, self.take, number)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            loop.add_signal_handler(signal.SIGHUP, self.take, signal.SIGTERM, "SIGHUP: the terminal is gone")
        loop.add_signal_handler(
            signal.SIGTSTP,
            self._terminal.say,
            "Ctrl-Z is not heeded: the ranks would end once this process were silent. Ctrl-C saves and stops.",
        )

    def take(self, number: signal.Signals, origin: str = "") -> None:
        """Notes a signal.

        Args:
            number: of the signal that the ranks are to be sent.
            origin: what was received and where, if it was not this signal here.
        """
        if self.first is None:
            self.first, self.since = number, time.monotonic()
            self._terminal.say(f"{origin or number.name}: asking all ranks to save and stop")
        elif number == signal.SIGINT and not origin and not self.is_kill:
            self.is_kill = True
            self._terminal.say("second SIGINT: killing all ranks")
        self.on_change()

"""Handles stop signals of `beit3 launch`. The first signal makes all ranks save and stop; a later Ctrl-C kills them."""

import asyncio
import signal
import time
from collections.abc import Callable

from beit3_ds.cluster.launch.terminal import Terminal
from beit3_ds.runtime.stop_signals import describe_signal, exit_status, handled_signals


class LauncherStopSignals:
    """Records the first stop signal, which is forwarded to all ranks. A later SIGINT kills the ranks.

    SIGHUP counts as SIGTERM. SIGTSTP (Ctrl-Z) is ignored, because the ranks would lose contact with a suspended `beit3
    launch`, and end.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.first: signal.Signals | None = None
        """First stop signal that was received; None before any stop signal."""
        self.since = 0.0
        """Monotonic time of the first stop signal in seconds."""
        self.is_kill = False
        """Whether to kill the ranks without saving."""
        self.on_change: Callable[[], None] = lambda: None
        """Function that is called after every stop signal."""

    def handle(self) -> None:
        """Installs the signal handlers in the running event loop."""
        loop = asyncio.get_running_loop()
        for number in handled_signals():
            loop.add_signal_handler(number, self.receive, number)
        loop.add_signal_handler(
            signal.SIGTSTP,
            self._terminal.report,
            "Ctrl-Z is ignored, because the ranks end when this process is silent. Ctrl-C saves and stops.",
        )

    def receive(self, number: signal.Signals, origin: str = "") -> None:
        """Records a stop signal.

        Args:
            number: stop signal. If it is SIGHUP, SIGTERM is forwarded to the ranks.
            origin: source of the signal, for the printed message; empty if this process itself received the signal.
        """
        if self.first is None:
            self.first, self.since = signal.Signals(exit_status(number) - 128), time.monotonic()
            self._terminal.report(f"{origin or describe_signal(number)}: asking all ranks to save and stop")
        elif number == signal.SIGINT and not origin and not self.is_kill:
            self.is_kill = True
            self._terminal.report("second SIGINT: killing all ranks")
        self.on_change()

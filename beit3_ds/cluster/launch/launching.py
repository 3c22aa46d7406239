"""Runs `beit3 launch`: checks the hosts, starts the ranks, and restarts from the newest checkpoint after a failure."""

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.cluster.check.reachability import find_unreachable
from beit3_ds.cluster.hostfile import Hostfile, HostSlots, is_loopback, read_hostfile, write_hostfile
from beit3_ds.cluster.launch.attempt import USER_ERROR, Attempt
from beit3_ds.cluster.launch.attempt_plan import AttemptPlan, Outcome
from beit3_ds.cluster.launch.elastic import largest_fit
from beit3_ds.cluster.launch.forwarding import describe_forwarded, forwarded_environment
from beit3_ds.cluster.launch.launcher_command import (
    EQUAL_SLOTS,
    Launcher,
    build_commands,
    check_launcher,
    launcher_environment,
)
from beit3_ds.cluster.launch.plain_words import check_plain_word
from beit3_ds.cluster.launch.stop_signals import LauncherStopSignals
from beit3_ds.cluster.launch.terminal import Terminal
from beit3_ds.config import ConfigError, RunConfig, check_layout, fits_layout, load_run_config
from beit3_ds.printing import printable
from beit3_ds.writer_lock import WriterLock

_STEP = re.compile(r"step-(\d+)")
_ATTEMPT = re.compile("attempt_([0-9]+)")
_RESTART_SECONDS = 2.0  # pause before a restart, in case every attempt fails at once


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Holds the command-line options of `beit3 launch`."""

    hostfile: str
    config: str
    changes: Sequence[str]
    """Changes to the config from the option `--set`, each as KEY=VALUE."""
    launcher: Launcher
    restarts: int
    """Maximum number of restarts after failures."""
    min_ranks: int
    """Minimum number of ranks after a restart."""
    log_dir: str | None
    """Log folder; None means `logs` in the run's output folder."""
    environment: Sequence[str]
    """Environment variables to forward in addition to the default ones, each as NAME or NAME=VALUE."""
    keepalive_seconds: float
    """Number of seconds: if `beit3 launch` and a host exchange no message for this time, each considers the other lost.
    """
    start_seconds: float
    """Maximum seconds until the guards, which start the training processes, have connected to `beit3 launch`."""
    port: int
    """Port on which `beit3 launch` waits for the guards, which start and watch the ranks; 0 means any free port."""
    force: bool = False
    """Whether to move the checkpoints of a finished run aside and train again (`beit3 train --force`)."""
    dry_run: bool = False
    """Whether to print the command, hosts and variables of the ranks without starting any process."""
    module: str = "beit3_ds.train"
    """Python module that every rank runs, with the config and the changes to the config as arguments."""


def launch(options: LaunchOptions) -> int:
    """Trains on the machines of a hostfile until the training ends.

    Returns:
        Exit status. 0: the training has finished, or this was a dry run. 128 + n: signal n stopped the training, and
        all finished steps are saved. 2: a rank failed because of a user's mistake. 1: any other failure.

    Raises:
        ConfigError: if the run cannot work, a host cannot be reached, another launch writes into the log folder, or the
            processes cannot be started.
    """
    hostfile = read_hostfile(options.hostfile)
    config = load_run_config(options.config, options.changes)
    check_layout(config, hostfile.world_size)
    of_launcher = launcher_environment(options.launcher, os.environ)
    check_launcher(
        options.launcher, hostfile, of_launcher, lambda program: shutil.which(program, path=of_launcher["PATH"])
    )
    environment = forwarded_environment(os.environ, options.environment)
    log_dir = Path(options.log_dir or Path(config.training.output_dir) / "logs").absolute()
    if options.dry_run:
        print(_describe_launch(options, hostfile, environment, of_launcher, log_dir))
        return 0
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the log folder {log_dir} cannot be created: {error.strerror}. Name one that all hosts share: --log-dir."
        ) from None
    run = _Launch(options, config, hostfile, environment, log_dir)
    command = f"beit3 launch {options.hostfile} {options.config}"  # without values of --env, which may be secrets
    way_out = "name another log folder with --log-dir"
    with WriterLock(
        log_dir / "launch.lock", f"the log folder {log_dir}", way_out, command=command, is_stopping=run.is_stopping
    ):
        return asyncio.run(run.run())


class _Launch:
    def __init__(
        self,
        options: LaunchOptions,
        config: RunConfig,
        hostfile: Hostfile,
        environment: Mapping[str, str],
        log_dir: Path,
    ) -> None:
        self._options, self._config, self._environment = options, config, environment
        self._hosts = list(hostfile.hosts)
        self._hostfile, self._log_dir = hostfile, log_dir
        self._terminal = Terminal(log_dir / "launch.log")
        self._stop_signals = LauncherStopSignals(self._terminal)
        self._attempt_hostfile = log_dir / "hostfile"
        """Hostfile that was written when the ranks were last started. Its modification time is the time of that start.
        """
        self._outdated: int | None = None  # inode of the finished run's folder of checkpoints
        if options.force and self._is_trained():
            self._outdated = self._checkpoints_inode()

    def is_stopping(self) -> bool:
        return self._stop_signals.first is not None

    async def run(self) -> int:
        self._stop_signals.handle()
        await self._check_reachable()
        if self._stop_signals.first is not None:
            return self._report_stop()
        restarts = 0
        while True:
            outcome = await self._attempt()
            status = self._status(outcome)
            if status != 1:
                return status
            if self._stop_signals.first is not None or restarts == self._options.restarts:
                self._terminal.report(self._give_up(restarts))
                return status
            restarts += 1
            if not await self._prepare_restart(outcome, restarts):
                return status

    async def _check_reachable(self) -> None:
        faults = await self._find_unreachable([host.name for host in self._hosts])
        if faults:
            raise ConfigError(
                f"hostfile {self._hostfile.path}: "
                + "; ".join(f"host {name} cannot be reached: {fault}" for name, fault in faults.items())
                + ". Fix it or remove it from the hostfile."
            )

    async def _find_unreachable(self, names: Sequence[str]) -> dict[str, str]:
        # In a Slurm allocation srun and mpirun start processes without ssh, which the hosts may refuse.
        uses_slurm = self._options.launcher == "slurm" or (
            self._options.launcher in ("openmpi", "mpich") and "SLURM_JOB_ID" in os.environ
        )
        if self._hostfile.is_local or uses_slurm:
            return {}
        search = asyncio.create_task(find_unreachable(names))
        await self._wait_unless_stopped(search)
        if search.done():
            return search.result()
        search.cancel()
        return {}

    async def _attempt(self) -> Outcome:
        address = _own_address(self._hosts, self._hostfile.path)
        folder = self._new_folder()
        hostfile = write_hostfile(folder / "hostfile", self._hosts)
        self._attempt_hostfile = hostfile.path
        options = self._options
        try:
            with hostfile.path.open("rb") as file:
                # The path on mpirun's command line must be plain, but the folder's path may have any characters.
                plain = Hostfile(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"), hostfile.hosts)
                plan = AttemptPlan(
                    hosts=self._hosts,
                    build_commands=lambda guard: build_commands(options.launcher, plain, guard),
                    launcher_environment=launcher_environment(options.launcher, os.environ),
                    trainer=_trainer_command(options, force=options.force and not self._is_trained()),
                    environment=self._environment,
                    folder=Path.cwd(),
                    log_dir=folder,
                    address=address,
                    port=options.port,
                    keepalive_seconds=options.keepalive_seconds,
                    start_seconds=options.start_seconds,
                )
                return await Attempt(plan, self._stop_signals, self._terminal).run()
        except OSError as error:
            raise ConfigError(f"the launch failed: {error}. Logs are in {folder}.") from error

    def _new_folder(self) -> Path:
        # Only exact names count: a copy such as attempt_1.bak was not made by this program.
        taken = [int(match[1]) for path in self._log_dir.iterdir() if (match := _ATTEMPT.fullmatch(path.name))]
        folder = self._log_dir / f"attempt_{max(taken, default=0) + 1}"
        folder.mkdir()
        return folder

    def _status(self, outcome: Outcome) -> int:
        """Returns the exit status after an attempt (see `launch`). Prints a line unless the status is 1."""
        if outcome.is_user_error:
            self._terminal.report("a rank ended with status 2: this needs a change before the same command can resume")
            return USER_ERROR
        if outcome.failure is not None or self._stop_signals.is_kill:
            return 1
        done, total = self._saved_step(), self._config.training.total_steps
        if self._is_report_written() or (self._is_trained() and self._stop_signals.first is None):
            self._terminal.report(f"finished: {done or total} steps")
            return 0
        return self._report_stop()

    def _report_stop(self) -> int:
        """Prints what a stopped run has saved, and returns the exit status."""
        number = self._stop_signals.first or signal.SIGTERM  # `first` is None if ranks were stopped from elsewhere
        done, total = self._saved_step(), self._config.training.total_steps
        saved = f"the checkpoint of step {done} of {total} is saved" if done else "no step was done, nothing to save"
        self._terminal.report(f"stopped by {number.name}: {saved}; the same command resumes from there")
        return 128 + number

    def _is_report_written(self) -> bool:
        """Returns whether the run's report is newer than the last checkpoint, and newer than the start of the latest
        attempt.
        """
        output_dir = Path(self._config.training.output_dir)
        try:
            before = [output_dir / "checkpoints" / "latest", self._attempt_hostfile]
            written_at = (output_dir / "summary.json").stat().st_mtime_ns
            return all(written_at >= path.stat().st_mtime_ns for path in before)
        except OSError:
            return False

    async def _prepare_restart(self, outcome: Outcome, number: int) -> bool:
        """Waits until the ranks on lost hosts have ended, then chooses reachable hosts for a restart.

        Returns:
            Whether to restart; false after a stop signal, or if the reachable hosts are too few for the run.
        """
        await self._pause(max(_RESTART_SECONDS, outcome.clear_at - time.monotonic() + _RESTART_SECONDS))
        unreachable = await self._find_unreachable([host.name for host in self._hosts])
        if self._options.launcher == "slurm":  # Slurm's hosts may refuse ssh
            unreachable |= dict.fromkeys(outcome.lost_hosts, "it fell silent")
        left = [host for host in self._hosts if host.name not in unreachable]
        hosts = largest_fit(
            left,
            lambda world_size: fits_layout(self._config, world_size),
            equal_slots=self._options.launcher in EQUAL_SLOTS,
            min_ranks=self._options.min_ranks,
        )
        without = f" without {', '.join(unreachable)} (not reachable)" if unreachable else ""
        if self._stop_signals.first is not None:
            self._terminal.report(self._give_up(number - 1))
            return False
        if hosts is None:
            num_slots = sum(host.slots for host in left)
            self._terminal.report(
                f"no restart{without}: the layout of {self._options.config} fits no number of ranks between "
                f"{self._options.min_ranks} (--min-ranks) and {num_slots}. Once the hosts are back, the same command "
                f"resumes {self._resume_point()}."
            )
            return False
        before = sum(host.slots for host in self._hosts)
        self._hosts = hosts
        ranks = sum(host.slots for host in hosts)
        size = f"{ranks} rank{'' if ranks == 1 else 's'}{'' if ranks == before else f' instead of {before}'}"
        self._terminal.report(
            f"restart {number} of {self._options.restarts}{without}: {size} on {_describe_hosts(hosts)}, "
            f"{self._resume_point()}"
        )
        return True

    async def _pause(self, seconds: float) -> None:
        await self._wait_unless_stopped(asyncio.create_task(asyncio.sleep(seconds)))

    async def _wait_unless_stopped(self, work: "asyncio.Task[Any]") -> None:
        """Waits until a task has ended or a stop signal has arrived."""
        stopped = asyncio.Event()
        self._stop_signals.on_change = stopped.set
        if self._stop_signals.first is None:
            tasks = [work, asyncio.create_task(stopped.wait())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    def _give_up(self, restarts: int) -> str:
        why = (
            f"{self._stop_signals.first.name} was received"
            if self._stop_signals.first is not None
            else f"restarted {restarts} time{'' if restarts == 1 else 's'}"
            if restarts
            else "no restarts are allowed (--restarts N)"
        )
        return f"the run has failed ({why}); the same command resumes {self._resume_point()}"

    def _resume_point(self) -> str:
        done = self._saved_step()
        return f"from the checkpoint of step {done}" if done else "from the beginning, because there is no checkpoint"

    def _is_trained(self) -> bool:
        return (self._saved_step() or 0) >= self._config.training.total_steps

    def _saved_step(self) -> int | None:
        """Returns the step of the checkpoint that the file `latest` names. The checkpoint itself is not checked.

        Returns None if `latest` cannot be read or names no step. With `LaunchOptions.force`, the folder may still
        contain the checkpoints of an earlier run, which do not count: returns None until this run has moved them aside.
        """
        if self._outdated is not None and self._outdated == self._checkpoints_inode():
            return None
        try:
            text = (Path(self._config.training.output_dir) / "checkpoints" / "latest").read_text()
        except OSError:
            return None
        match = _STEP.fullmatch(text.strip())
        return int(match[1]) if match else None

    def _checkpoints_inode(self) -> int | None:
        """Returns the inode of the checkpoint folder, or None if there is no folder. Renaming keeps the inode."""
        try:
            return (Path(self._config.training.output_dir) / "checkpoints").stat().st_ino
        except OSError:
            return None


def _describe_hosts(hosts: Sequence[HostSlots]) -> str:
    return ", ".join(f"{host.name} ({host.slots})" for host in hosts)


def _trainer_command(options: LaunchOptions, *, force: bool) -> list[str]:
    config = options.config if not options.config.startswith("-") else f"./{options.config}"
    changes = [f"--set={change}" for change in options.changes]
    return [sys.executable, "-u", "-m", options.module, config, *changes, *(["--force"] if force else [])]


def _describe_launch(
    options: LaunchOptions,
    hostfile: Hostfile,
    environment: Mapping[str, str],
    of_launcher: Mapping[str, str],
    log_dir: Path,
) -> str:
    """Returns the text of a dry run: hosts, command, folders and variables, without values that may be secrets."""
    how = "on this machine" if hostfile.is_local else f"through {options.launcher}"
    return "\n".join(
        [
            f"would start {hostfile.world_size} ranks {how}: {_describe_hosts(hostfile.hosts)}",
            f"command of every rank: {printable(shlex.join(_trainer_command(options, force=options.force)))}",
            f"in the folder {printable(str(Path.cwd()))}, with logs in {printable(str(log_dir))}",
            "variables that are sent to every rank:",
            *(f"  {line}" for line in describe_forwarded(environment)),
            "variables of the launcher, some of which srun and mpirun also pass on, without their values:",
            f"  {' '.join(sorted(of_launcher))}",
            "nothing was started",
        ]
    )


def _own_address(hosts: Sequence[HostSlots], hostfile: Path) -> str:
    """Returns the address of this machine in the hosts' network."""
    names = [host.name for host in hosts]
    if len(names) == 1 and is_loopback(names[0]):
        return "127.0.0.1"
    faults = []
    own = "127.0.0.1"
    for name in names:  # the first name may be this machine's
        try:
            found = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
            continue
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:  # sends nothing
            probe.connect(target)
            own = str(probe.getsockname()[0])
        check_plain_word(own, "this machine's address", "Use an address without a zone (%...).")
        if not own.startswith("127.") and own != target[0]:
            return own
    if faults:
        raise ConfigError(f"hostfile {hostfile}: names cannot be looked up here: {'; '.join(faults)}.")
    return own

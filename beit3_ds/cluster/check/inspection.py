"""Asks all nodes in parallel about their hardware, their software and their connections to each other."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beit3_ds.cluster.check.node_connection import ANSWER_SECONDS, NoAnswer, NodeConnection
from beit3_ds.cluster.hostfile import Hostfile
from beit3_ds.runtime import versions

_CLOCK_SAMPLES = 3
_TOKEN_SECONDS = 3.0  # time for a network file system to show what another node has written


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """Holds the inputs of a cluster check: the folders and files to check, the master port, and the environment
    variables to set on every node.
    """

    folder: Path
    """Absolute path of the folder where the ranks would start."""
    output_dir: Path | None
    """Output folder of the run, which all nodes must share; None if the check has no run config."""
    files: Mapping[str, bool]
    """Maps each glob pattern of the run's input files to whether at least one file must match
    (`requirements.find_required_files`)."""
    master_port: int
    """TCP port on which rank 0 will listen."""
    environment: Mapping[str, str]
    """Environment variables that the launcher would set on the nodes."""

    @property
    def disks(self) -> dict[str, str]:
        """Returns the path of each folder whose disk needs free space, by purpose, such as "output folder"."""
        return {"/tmp": "/tmp", "output folder": str(self.output_dir or self.folder)}


@dataclass(kw_only=True)
class Answers:
    """Holds the answers of one node in a cluster check. Fields of unanswered questions are None or empty."""

    name: str
    """Name of the host."""
    slots: int
    """Number of ranks that the hostfile gives to the node."""
    silence: str | None = None
    """Reason why the node stopped answering; None if the node answers."""
    seconds: float = 0.0
    """Seconds between the start of ssh and the node's first answer."""
    machine: dict[str, Any] | None = None
    """Facts about the machine by name, such as "hostname" (`Probe.machine`)."""
    software: dict[str, Any] | None = None
    """Versions of the installed packages, and digests of the project's source files (`Probe.software`)."""
    gpus: dict[str, Any] | None = None
    """Result of `Probe.gpus`: "gpus" holds the GPUs that nvidia-smi lists, and "error" holds nvidia-smi's error message
    or None."""
    disks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Total and free bytes of the disk under each checked folder (`Probe.disk`), by purpose of the folder."""
    files: dict[str, tuple[int, str]] | None = None
    """Number and digest of the files that match each glob pattern (`Probe.files`), by pattern."""
    clock: float | None = None
    """Seconds by which the node's clock is ahead of this machine's clock; negative if behind."""
    clock_error: float = 0.0
    """Maximum error of `clock` in seconds: half the round-trip time of the fastest clock request."""
    token_error: str | None = None
    """Error message if the node could not write its token, a test file, into the shared folder; None if there was no
    error."""
    tokens_missing: tuple[str, ...] | None = None
    """Names of the hosts whose tokens this node cannot see in the shared folder; None if this node was not asked or did
    not answer. Each host's token is a test file that the host writes."""
    listener: dict[str, Any] | None = None
    """Result of `Probe.listen`. It contains the port on which the node listens for test connections. The first host
    uses the master port if it is free."""
    connections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of this node's test connections (`Probe.connect`), by target host. A result has the two addresses of the
    connection, or an error."""
    source_address: str | None = None
    """Address that this node uses for connections to other nodes."""
    interface: str | None = None
    """Network interface that has the address `source_address` on the node."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Holds the inputs of a cluster check and the answers of all nodes."""

    inquiry: Inquiry
    """Inputs of the cluster check."""
    answers: tuple[Answers, ...]
    """Answers of each host, in the order of the hostfile."""
    master_address: str | None
    """Address that DeepSpeed would choose as MASTER_ADDR: the first address of the first host. None if no address of
    the first host is known."""
    named_master: Mapping[str, dict[str, Any]]
    """Result of each host's test connection to the first host. The test uses the first host's name instead of its
    address. Keys are the names of the connecting hosts. A result has the two addresses of the connection, or an error.
    """
    shared_folder: str | None
    """Folder where the nodes wrote test files: the output folder, or its nearest existing parent. None if the check has
    no run config, or if no node reports the folder."""


def inspect_cluster(hostfile: Hostfile, inquiry: Inquiry) -> Inspection:
    """Starts a probe on every node in parallel and collects the probes' answers. Every wait has a time limit.

    Every node writes a small test file into the shared folder, and deletes this file at the end.
    """
    return asyncio.run(_Inspector(hostfile, inquiry).run())


class _Inspector:
    def __init__(self, hostfile: Hostfile, inquiry: Inquiry) -> None:
        self._inquiry = inquiry
        self._answers = [Answers(name=host.name, slots=host.slots) for host in hostfile.hosts]
        self._connections = [NodeConnection(host.name, inquiry.environment) for host in hostfile.hosts]
        self._tokens = [secrets.token_hex(8) for _ in self._connections]
        self._named_master: dict[str, dict[str, Any]] = {}
        self._shared_folder: str | None = None
        self._master_addresses: list[str] = []

    async def run(self) -> Inspection:
        try:
            await self._ask_all(self._ask_about_itself)
            if self._inquiry.output_dir is not None:
                await self._share_folder(str(self._inquiry.output_dir))
            await self._ask_all(self._resolve_master)
            await self._ask_all(self._listen)
            await self._ask_all(self._connect)
        finally:
            await asyncio.gather(*(connection.close() for connection in self._connections))
        return Inspection(
            inquiry=self._inquiry,
            answers=tuple(self._answers),
            master_address=self._master_address(),
            named_master=self._named_master,
            shared_folder=self._shared_folder,
        )

    async def _ask_all(self, ask: Callable[[int], Awaitable[None]]) -> None:
        async def ask_unless_silent(index: int) -> None:
            if self._answers[index].silence is None:
                try:
                    await ask(index)
                except NoAnswer as error:
                    self._answers[index].silence = str(error)

        await asyncio.gather(*(ask_unless_silent(index) for index in range(len(self._connections))))

    async def _ask_about_itself(self, index: int) -> None:
        connection, answers, begin = self._connections[index], self._answers[index], time.monotonic()
        await connection.start()
        answers.machine = await connection.ask("machine", folder=str(self._inquiry.folder))
        answers.seconds = time.monotonic() - begin
        answers.software = await connection.ask(
            "software", module_text=Path(versions.__file__).read_text(encoding="utf-8")
        )
        answers.gpus = await connection.ask("gpus")
        for purpose, folder in self._inquiry.disks.items():
            answers.disks[purpose] = await connection.ask("disk", folder=folder)
        patterns = list(self._inquiry.files)
        if patterns:
            found = await connection.ask("files", patterns=patterns)
            answers.files = {
                pattern: (number, digest) for pattern, (number, digest) in zip(patterns, found, strict=True)
            }
        for _ in range(_CLOCK_SAMPLES):
            before, asked = time.time(), time.monotonic()
            clock = await connection.ask("clock")
            error = (time.monotonic() - asked) / 2
            if answers.clock is None or error < answers.clock_error:
                answers.clock, answers.clock_error = clock - (before + error), error

    async def _share_folder(self, output_dir: str) -> None:
        first = next((index for index, answers in enumerate(self._answers) if answers.silence is None), None)
        if first is None:
            return
        try:
            folder = await self._connections[first].ask("parent", folder=output_dir)
        except NoAnswer as error:
            self._answers[first].silence = str(error)
            return
        self._shared_folder = folder
        paths = [f"{folder}/.beit3-check-{token}" for token in self._tokens]

        async def write(index: int) -> None:
            self._answers[index].token_error = await self._connections[index].ask(
                "write_token", path=paths[index], token=self._tokens[index]
            )

        await self._ask_all(write)
        writers = [i for i, answers in enumerate(self._answers) if answers.silence is answers.token_error is None]

        async def read(index: int) -> None:
            found = await self._connections[index].ask(
                "read_tokens",
                ANSWER_SECONDS + _TOKEN_SECONDS,
                paths=[paths[writer] for writer in writers],
                patience=_TOKEN_SECONDS,
            )
            self._answers[index].tokens_missing = tuple(
                self._answers[writer].name
                for writer, token in zip(writers, found, strict=True)
                if token != self._tokens[writer]
            )

        await self._ask_all(read)

    async def _resolve_master(self, index: int) -> None:
        """Records the addresses to which one node resolves the first node's host name."""
        self._master_addresses += await self._connections[index].ask("resolve", name=self._answers[0].name)

    async def _listen(self, index: int) -> None:
        """Makes one node listen at the addresses to which other nodes connect, and at no other address."""
        first = _first_address(self._answers[index])
        addresses = [*([first] if first else []), *(self._master_addresses if index == 0 else [])]
        if not addresses:
            return
        self._answers[index].listener = await self._connections[index].ask(
            "listen",
            port=self._inquiry.master_port if index == 0 else 0,
            token=self._tokens[index],
            addresses=list(dict.fromkeys(addresses)),
        )

    async def _connect(self, index: int) -> None:
        """Makes one node connect to the first address of every node, and to node 0 by host name."""
        others = [
            (i, address, answers.listener["port"])
            for i, answers in enumerate(self._answers)
            if answers.listener is not None and (address := _first_address(answers))
        ]
        targets: list[Sequence[Any]] = [(address, port) for _, address, port in others]
        first = self._answers[0]
        if first.listener is not None:
            targets.append((first.name, first.listener["port"]))
        results = await self._connections[index].ask("connect", targets=targets)
        answers = self._answers[index]
        for (i, _, _), result in zip(others, results, strict=False):
            self._check_token(result, i)
            answers.connections[self._answers[i].name] = result
        if first.listener is not None:
            self._check_token(results[-1], 0)
            self._named_master[answers.name] = results[-1]
        ways = [result for name, result in answers.connections.items() if name != answers.name and "own" in result]
        if ways:
            answers.source_address, answers.interface = ways[0]["own"], ways[0]["interface"]

    def _check_token(self, result: dict[str, Any], index: int) -> None:
        if "error" not in result and result.get("token") != self._tokens[index]:
            result["error"] = "another machine or program answers there"

    def _master_address(self) -> str | None:
        return _first_address(self._answers[0])


def _first_address(answers: Answers) -> str | None:
    return answers.machine["addresses"][0] if answers.machine and answers.machine["addresses"] else None

"""All nodes asked at once about what a run needs of them, and of each other."""

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
_TOKEN_SECONDS = 3.0  # for a network file system to show what another node has written


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """What is asked beside the machines themselves."""

    folder: Path
    """Where ranks would start: absolute."""
    output_dir: Path | None
    """That all nodes must share; None without a config."""
    files: Mapping[str, bool]
    """Glob patterns of what a run reads, and whether it must be there already: its tokenizers may still be trained."""
    master_port: int
    """On which rank 0 will listen."""
    environment: Mapping[str, str]
    """Variables that the launcher would set on the nodes."""

    @property
    def disks(self) -> dict[str, str]:
        """Where free space is looked at, by what it is for."""
        return {"/tmp": "/tmp", "output folder": str(self.output_dir or self.folder)}


@dataclass(kw_only=True)
class Answers:
    """What one node said; what it was not asked, because it fell silent before, is None."""

    name: str
    """Of the host."""
    slots: int
    """Ranks that the hostfile starts there."""
    silence: str | None = None
    """Why it answers no more."""
    seconds: float = 0.0
    """From the call to the first answer."""
    machine: dict[str, Any] | None = None
    """As `Probe.machine`."""
    software: dict[str, Any] | None = None
    """As `Probe.software`."""
    gpus: dict[str, Any] | None = None
    """As `Probe.gpus`."""
    disks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """As `Probe.disk`, by what the disk is for."""
    files: dict[str, tuple[int, str]] | None = None
    """As `Probe.files`, by pattern."""
    clock: float | None = None
    """Seconds by which it is ahead of the asking machine."""
    clock_error: float = 0.0
    """Seconds by which that may be wrong: half of the fastest round trip."""
    token_error: str | None = None
    """Why it could not write into the shared folder."""
    tokens_missing: tuple[str, ...] | None = None
    """Hosts whose files in the shared folder it does not see."""
    listener: dict[str, Any] | None = None
    """As `Probe.listen`; of the first host for the master port, of the others for any."""
    connections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """As `Probe.connect`, by the host that was called; with `wrong` if another machine answered."""
    own_address: str | None = None
    """By which it reaches the others."""
    interface: str | None = None
    """That has this address."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What all nodes said."""

    inquiry: Inquiry
    """What was asked."""
    answers: tuple[Answers, ...]
    """One a host, in the order of the hostfile."""
    master_address: str | None
    """That DeepSpeed would take: the first address of the first host."""
    named_master: Mapping[str, dict[str, Any]]
    """By host: how the first host answered to its name; see `Probe.connect`."""
    shared_folder: str | None
    """Where tokens were written: the output folder, or the nearest above it that exists."""


def inspect_cluster(hostfile: Hostfile, inquiry: Inquiry) -> Inspection:
    """Calls all nodes at once and asks everything; nothing waits longer than its bound.

    Writes a small file into the shared folder from every node, and deletes it.
    """
    return asyncio.run(_Inspector(hostfile, inquiry).run())


class _Inspector:
    def __init__(self, hostfile: Hostfile, inquiry: Inquiry) -> None:
        self._inquiry = inquiry
        self._answers = [Answers(name=host.name, slots=host.slots) for host in hostfile.hosts]
        self._talks = [NodeConnection(host.name, inquiry.environment) for host in hostfile.hosts]
        self._tokens = [secrets.token_hex(8) for _ in self._talks]
        self._named_master: dict[str, dict[str, Any]] = {}
        self._shared_folder: str | None = None

    async def run(self) -> Inspection:
        try:
            await self._everywhere(self._ask_about_itself)
            if self._inquiry.output_dir is not None:
                await self._share_folder(str(self._inquiry.output_dir))
            await self._everywhere(self._listen)
            await self._everywhere(self._connect)
        finally:
            await asyncio.gather(*(talk.close() for talk in self._talks))
        return Inspection(
            inquiry=self._inquiry,
            answers=tuple(self._answers),
            master_address=self._master_address(),
            named_master=self._named_master,
            shared_folder=self._shared_folder,
        )

    async def _everywhere(self, ask: Callable[[int], Awaitable[None]]) -> None:
        async def unless_silent(index: int) -> None:
            if self._answers[index].silence is None:
                try:
                    await ask(index)
                except NoAnswer as error:
                    self._answers[index].silence = str(error)

        await asyncio.gather(*(unless_silent(index) for index in range(len(self._talks))))

    async def _ask_about_itself(self, index: int) -> None:
        talk, answers, begin = self._talks[index], self._answers[index], time.monotonic()
        await talk.start()
        answers.machine = await talk.ask("machine", folder=str(self._inquiry.folder))
        answers.seconds = time.monotonic() - begin
        answers.software = await talk.ask("software", source=Path(versions.__file__).read_text(encoding="utf-8"))
        answers.gpus = await talk.ask("gpus")
        for purpose, folder in self._inquiry.disks.items():
            answers.disks[purpose] = await talk.ask("disk", folder=folder)
        patterns = list(self._inquiry.files)
        if patterns:
            found = await talk.ask("files", patterns=patterns)
            answers.files = {
                pattern: (number, digest) for pattern, (number, digest) in zip(patterns, found, strict=True)
            }
        for _ in range(_CLOCK_SAMPLES):
            before, asked = time.time(), time.monotonic()
            told = await talk.ask("clock")
            error = (time.monotonic() - asked) / 2
            if answers.clock is None or error < answers.clock_error:
                answers.clock, answers.clock_error = told - (before + error), error

    async def _share_folder(self, output_dir: str) -> None:
        first = next((index for index, answers in enumerate(self._answers) if answers.silence is None), None)
        if first is None:
            return
        try:
            folder = await self._talks[first].ask("parent", folder=output_dir)
        except NoAnswer as error:
            self._answers[first].silence = str(error)
            return
        self._shared_folder = folder
        paths = [f"{folder}/.beit3-check-{token}" for token in self._tokens]

        async def write(index: int) -> None:
            self._answers[index].token_error = await self._talks[index].ask(
                "write_token", path=paths[index], token=self._tokens[index]
            )

        await self._everywhere(write)
        writers = [i for i, answers in enumerate(self._answers) if answers.silence is answers.token_error is None]

        async def read(index: int) -> None:
            found = await self._talks[index].ask(
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

        await self._everywhere(read)

    async def _listen(self, index: int) -> None:
        port = self._inquiry.master_port if index == 0 else 0
        self._answers[index].listener = await self._talks[index].ask("listen", port=port, token=self._tokens[index])

    async def _connect(self, index: int) -> None:
        """Calls every other node by its first address, and the first node also by its name."""
        others = [
            (i, address, answers.listener["port"])
            for i, answers in enumerate(self._answers)
            if answers.listener is not None and (address := _first_address(answers))
        ]
        targets: list[Sequence[Any]] = [(address, port) for _, address, port in others]
        first = self._answers[0]
        if first.listener is not None:
            targets.append((first.name, first.listener["port"]))
        results = await self._talks[index].ask("connect", targets=targets)
        answers = self._answers[index]
        for (i, _, _), result in zip(others, results, strict=False):
            self._judge(result, i)
            answers.connections[self._answers[i].name] = result
        if first.listener is not None:
            self._judge(results[-1], 0)
            self._named_master[answers.name] = results[-1]
        ways = [result for name, result in answers.connections.items() if name != answers.name and "own" in result]
        if ways:
            answers.own_address, answers.interface = ways[0]["own"], ways[0]["interface"]

    def _judge(self, result: dict[str, Any], index: int) -> None:
        if "error" not in result and result.get("token") != self._tokens[index]:
            result["error"] = "another machine or program answers there"

    def _master_address(self) -> str | None:
        return _first_address(self._answers[0])


def _first_address(answers: Answers) -> str | None:
    return answers.machine["addresses"][0] if answers.machine and answers.machine["addresses"] else None

"""The speed of every link between the nodes, measured, and which of them are slow."""

import asyncio
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.cluster.check import link_worker
from beit3_ds.cluster.check.fault import Fault
from beit3_ds.cluster.check.inspection import Inspection
from beit3_ds.cluster.check.link_worker import pair_rounds
from beit3_ds.cluster.check.node_connection import NoAnswer, NodeConnection

FLOOR_BITS = 0.5e9
"""Half of 1 GbE, the slowest network that clusters have: where nothing better is expected, less is a fault."""
_SLOW = 0.5  # of what a link should reach
_START_SECONDS = 90.0  # imports of torch from a shared file system, and the rendezvous
_ROUND_SECONDS = 10.0
_TRIES = 3  # of links that look slow
_MATRIX_HOSTS = 8


@dataclass(frozen=True)
class Links:
    """What was measured, in bits a second."""

    backend: str
    """"gloo" or "nccl"."""
    rates: Mapping[tuple[str, str], float]
    """By sender and receiver."""
    all_reduce: float
    """Bus bandwidth of an all-reduce over all nodes, of the slowest rank."""

    @property
    def names(self) -> list[str]:
        """Of the hosts, in their order."""
        return list(dict.fromkeys(sender for sender, _ in self.rates))

    @property
    def usual(self) -> float:
        """What links reach here: the median over nodes of each one's fastest link.

        The plain median would be the slow one where a node of three is slow, as two of their three links are then.
        """
        fastest = [max(rate for pair, rate in self.rates.items() if name in pair) for name in self.names]
        return statistics.median(fastest)


def measure_links(inspection: Inspection, expected_bits: float | None) -> Links | list[Fault]:
    """Sends between all pairs of nodes, in rounds of disjoint pairs, then over all at once.

    Links that look slow are measured again: other traffic and busy cores only ever slow one down.

    Args:
        inspection: of nodes that all answer and can connect, which have no fault of "network".
        expected_bits: as for `link_speed_faults`.

    Returns:
        The rates, or what went wrong. Takes about a second for each node, and the import of torch.
    """
    return asyncio.run(_Measurement(inspection, expected_bits).run())


class _Measurement:
    def __init__(self, inspection: Inspection, expected_bits: float | None) -> None:
        self._inspection, self._expected_bits = inspection, expected_bits
        nodes = inspection.answers
        self._names = [node.name for node in nodes]
        self._backend = "nccl" if all(node.gpus and node.gpus["gpus"] for node in nodes) else "gloo"
        self._talks = []
        for node in nodes:
            environment = dict(inspection.inquiry.environment)
            if node.interface is not None:  # so that the machine's own name does not matter
                environment.setdefault("GLOO_SOCKET_IFNAME", node.interface)
            self._talks.append(NodeConnection(node.name, environment, Path(link_worker.__file__)))
        self._faults: list[Fault] = []

    async def run(self) -> Links | list[Fault]:
        try:
            await asyncio.gather(*(talk.start() for talk in self._talks))
            return await self._measure()
        except NoAnswer:
            return self._faults
        finally:
            await asyncio.gather(*(talk.close() for talk in self._talks))

    async def _measure(self) -> Links:
        size = len(self._talks)
        common = {
            "world_size": size,
            "address": self._inspection.master_address,
            "port": self._inspection.inquiry.master_port,
            "backend": self._backend,
        }
        await self._ask_all("join", _START_SECONDS, [{"rank": rank, **common} for rank in range(size)])
        rounds = pair_rounds(size)
        rates: dict[tuple[str, str], float] = {}
        for _ in range(_TRIES):
            told = await self._ask_all(
                "measure", _START_SECONDS + _ROUND_SECONDS * len(rounds), [{"rounds": rounds}] * size
            )
            for sender, of_sender in zip(self._names, told, strict=True):
                for other, rate in of_sender.items():
                    pair = sender, self._names[int(other)]
                    rates[pair] = max(rate, rates.get(pair, 0.0))
            slow = _slow_pairs(Links(self._backend, rates, 0.0), self._expected_bits)[0]
            again = [[pair for pair in pairs if self._is_slow(pair, slow)] for pairs in rounds]
            if not (rounds := [pairs for pairs in again if pairs]):
                break
        reduced = await self._ask_all("all_reduce", _START_SECONDS, [{"slowest": min(rates.values())}] * size)
        return Links(self._backend, rates, min(reduced))

    def _is_slow(self, pair: tuple[int, int], slow: Mapping[tuple[str, str], float]) -> bool:
        a, b = (self._names[rank] for rank in pair)
        return (a, b) in slow or (b, a) in slow

    async def _ask_all(self, question: str, seconds: float, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Asks all at once, for they wait for each other; if some fail, notes all that did."""

        async def ask(rank: int) -> Any:
            try:
                return await self._talks[rank].ask(question, seconds, **arguments[rank])
            except NoAnswer as error:
                text = f"the measurement of links failed: it {error}. --bandwidth needs torch and open ports there."
                self._faults.append(Fault(self._names[rank], "network", text))

        answers = await asyncio.gather(*(ask(rank) for rank in range(len(self._talks))))
        if self._faults:
            raise NoAnswer(question)
        return answers


def _slow_pairs(links: Links, expected_bits: float | None) -> tuple[dict[tuple[str, str], float], str]:
    """The links that are below what they must reach, and words for that."""
    least, reason = _SLOW * links.usual, f"half of the {_gbit(links.usual)} that links reach here"
    if expected_bits is not None:
        least, reason = _SLOW * expected_bits, f"half of the {_gbit(expected_bits)} that were expected"
    elif least < FLOOR_BITS:
        least, reason = FLOOR_BITS, f"{_gbit(FLOOR_BITS)}, half of the slowest network that clusters have"
    return {pair: rate for pair, rate in links.rates.items() if rate < least}, reason


def link_speed_faults(links: Links, expected_bits: float | None) -> Iterator[Fault]:
    """Names the links below half of what is expected, or below half of what links reach here and the floor.

    Args:
        links: as measured.
        expected_bits: a second, of every link; None to compare the links with each other only.
    """
    slow, reason = _slow_pairs(links, expected_bits)
    way_out = "Look at its cable, port and negotiated speed (ethtool), at other traffic, and at the routes."
    for name in links.names:
        for index, way in ((0, "sends to"), (1, "receives from")):
            found = [(pair[1 - index], rate) for pair, rate in slow.items() if pair[index] == name]
            if len(found) == len(links.names) - 1 > 1:
                fastest = max(rate for _, rate in found)
                yield Fault(
                    name, "network", f"{way} every other node at {_gbit(fastest)} at most, below {reason}. {way_out}"
                )
                for other, _ in found:
                    slow.pop((name, other) if index == 0 else (other, name))
    for (sender, receiver), rate in slow.items():
        yield Fault(sender, "network", f"sends to {receiver} at {_gbit(rate)}, below {reason}. {way_out}")


def describe_links(links: Links) -> str:
    """A matrix of a few nodes' rates, or of many the slowest and fastest links."""
    names = links.names
    ordered = sorted(links.rates.items(), key=lambda item: item[1])
    lines = [
        f"links ({links.backend}): usual {_gbit(links.usual)}; all-reduce over {len(names)} nodes "
        f"{_gbit(links.all_reduce)} bus bandwidth"
    ]
    if len(names) <= _MATRIX_HOSTS:
        rows = [["Gbit/s", *(f"to {name}" for name in names)]]
        rows += [[f"from {a}", *("-" if a == b else f"{links.rates[a, b] / 1e9:.3g}" for b in names)] for a in names]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    else:
        lines += [f"slowest: {a} to {b} {_gbit(rate)}" for (a, b), rate in ordered[:3]]
        lines += [f"fastest: {a} to {b} {_gbit(rate)}" for (a, b), rate in ordered[-1:]]
    return "\n".join(lines)


def _gbit(bits: float) -> str:
    return f"{bits / 1e9:.3g} Gbit/s"

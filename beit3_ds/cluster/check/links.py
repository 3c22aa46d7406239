"""Measures the speed of every network link between the nodes, and finds slow links."""

import asyncio
import secrets
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
from beit3_ds.runtime import versions

FLOOR_BITS = 0.5e9
"""Speed in bits per second (half of 1 Gbit/s). If the user gives no expected speed, every link below this speed counts
as slow."""
_SLOW = 0.5  # share of the usual or expected speed below which a link is slow
_START_SECONDS = 90.0  # to import torch from a shared file system and to connect
_ROUND_SECONDS = 10.0
_TRIES = 3  # maximum measurements of a link that looks slow
_MATRIX_HOSTS = 8  # maximum number of hosts for which all links are printed


@dataclass(frozen=True)
class Links:
    """Holds the measured speeds of all links in bits per second."""

    backend: str
    """Backend of torch.distributed that sent the data: "gloo" or "nccl"."""
    rates: Mapping[tuple[str, str], float]
    """Bits per second of each link. A key is (sending host, receiving host)."""
    all_reduce: float
    """Bus bandwidth of an all-reduce over all nodes in bits per second, as measured on the slowest rank."""

    @property
    def names(self) -> list[str]:
        """Returns the host names in the order of the hostfile."""
        return list(dict.fromkeys(sender for sender, _ in self.rates))

    @property
    def usual(self) -> float:
        """Returns the usual speed of a link in bits per second.

        This is the median, over all nodes, of the speed of a node's fastest link. The median over all links would be
        wrong with three nodes. These have six links, one per direction, and one slow node can make four of the six
        slow.
        """
        fastest = [max(rate for pair, rate in self.rates.items() if name in pair) for name in self.names]
        return statistics.median(fastest)


def measure_links(inspection: Inspection, expected_bits: float | None) -> Links | list[Fault]:
    """Measures the links between all pairs of nodes in rounds of disjoint pairs, then an all-reduce over all nodes.

    Slow links are measured up to three times, and the fastest result is kept. After the import of torch, the
    measurement takes about one second per node.

    Args:
        inspection: answers of all nodes. Every node must have answered, and no node may have a fault in the check
            "network".
        expected_bits: expected bits per second of every link; None if unknown (see `find_slow_links`).

    Returns:
        The measured speeds, or the faults that prevented the measurement.
    """
    return asyncio.run(_Measurement(inspection, expected_bits).run())


class _Measurement:
    def __init__(self, inspection: Inspection, expected_bits: float | None) -> None:
        self._inspection, self._expected_bits = inspection, expected_bits
        nodes = inspection.answers
        self._names = [node.name for node in nodes]
        self._backend = "nccl" if all(node.gpus and node.gpus["gpus"] for node in nodes) else "gloo"
        self._connections = []
        for node in nodes:
            environment = dict(inspection.inquiry.environment)
            if node.interface is not None:  # else gloo would use the address of the machine's own name
                environment.setdefault("GLOO_SOCKET_IFNAME", node.interface)
            self._connections.append(NodeConnection(node.name, environment, Path(link_worker.__file__)))
        self._faults: list[Fault] = []

    async def run(self) -> Links | list[Fault]:
        try:
            await asyncio.gather(*(connection.start() for connection in self._connections))
            return await self._measure()
        except NoAnswer:
            return self._faults
        finally:
            await asyncio.gather(*(connection.close() for connection in self._connections))

    async def _measure(self) -> Links:
        size = len(self._connections)
        common = {
            "world_size": size,
            "address": self._inspection.master_address,
            "port": self._inspection.inquiry.master_port,
            "backend": self._backend,
            "store_text": Path(versions.__file__).with_name("keyed_store.py").read_text(encoding="utf-8"),
            "secret": secrets.token_hex(32),
        }
        await self._ask_all("join", _START_SECONDS, [{"rank": rank, **common} for rank in range(size)])
        rounds = pair_rounds(size)
        rates: dict[tuple[str, str], float] = {}
        for _ in range(_TRIES):
            rates_by_rank = await self._ask_all(
                "measure", _START_SECONDS + _ROUND_SECONDS * len(rounds), [{"rounds": rounds}] * size
            )
            for sender, of_sender in zip(self._names, rates_by_rank, strict=True):
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
        """Sends a request to all nodes at once and returns all answers.

        The nodes communicate with each other before they answer, so all of them must get the request.

        Raises:
            NoAnswer: if a node fails. A fault is recorded for each failed node.
        """

        async def ask(rank: int) -> Any:
            try:
                return await self._connections[rank].ask(question, seconds, **arguments[rank])
            except NoAnswer as error:
                text = f"the measurement of links failed: it {error}. --bandwidth needs torch and open ports there."
                self._faults.append(Fault(self._names[rank], "network", text))

        answers = await asyncio.gather(*(ask(rank) for rank in range(len(self._connections))))
        if self._faults:
            raise NoAnswer(question)
        return answers


def _slow_pairs(links: Links, expected_bits: float | None) -> tuple[dict[tuple[str, str], float], str]:
    """Returns the bits per second of the links that are slower than a limit. Also returns a text that describes the
    limit.
    """
    least, reason = _SLOW * links.usual, f"half of the {_gbit(links.usual)} that links reach here"
    if expected_bits is not None:
        least, reason = _SLOW * expected_bits, f"half of the {_gbit(expected_bits)} that were expected"
    elif least < FLOOR_BITS:
        least, reason = FLOOR_BITS, f"{_gbit(FLOOR_BITS)}, half of the slowest network of clusters"
    return {pair: rate for pair, rate in links.rates.items() if rate < least}, reason


def find_slow_links(links: Links, expected_bits: float | None) -> Iterator[Fault]:
    """Yields a fault for each slow link. Exception: a node that is slow as a whole has one fault for all its slow
    links.

    A node is slow as a whole if it sends slowly to all other nodes, or receives slowly from all other nodes. With two
    nodes, each slow link has its own fault.

    A link is slow if it reaches less than half the expected speed. If the expected speed is unknown, the limit is half
    the usual speed (`Links.usual`), but at least `FLOOR_BITS`.

    Args:
        links: measured speeds of the links.
        expected_bits: expected bits per second of every link; None if unknown.
    """
    slow, reason = _slow_pairs(links, expected_bits)
    way_out = "Check its cable, port and negotiated speed (ethtool), other traffic, and the routes."
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
    """Formats the speeds of all links as a matrix. With many nodes, lists only the slowest and the fastest links."""
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

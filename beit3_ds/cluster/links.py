"""The speed of every link between the nodes, measured, and which of them are slow."""

import asyncio
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.cluster import link_worker
from beit3_ds.cluster.conversation import Conversation, NoAnswer
from beit3_ds.cluster.fault import Fault
from beit3_ds.cluster.inspection import Inspection

FLOOR_BITS = 0.5e9
"""Half of 1 GbE, the slowest network that clusters have: where nothing better is expected, less is a fault."""
_SLOW = 0.5  # of what a link should reach
_START_SECONDS = 90.0  # imports of torch from a shared file system, and the rendezvous
_ROUND_SECONDS = 10.0
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


def measure_links(inspection: Inspection) -> Links | list[Fault]:
    """Sends between all pairs of nodes, in rounds of disjoint pairs, then over all at once.

    Args:
        inspection: of nodes that all answer and can connect, which have no fault of "network".

    Returns:
        The rates, or what went wrong. Takes about a second for each node, and the import of torch.
    """
    return asyncio.run(_measure(inspection))


async def _measure(inspection: Inspection) -> Links | list[Fault]:
    nodes, inquiry = inspection.answers, inspection.inquiry
    backend = "nccl" if all(node.gpus and node.gpus["gpus"] for node in nodes) else "gloo"
    talks = []
    for node in nodes:
        environment = dict(inquiry.environment)
        if node.interface is not None:  # so that the machine's own name does not matter
            environment.setdefault("GLOO_SOCKET_IFNAME", node.interface)
        talks.append(Conversation(node.name, environment, Path(link_worker.__file__)))
    seconds = _START_SECONDS + _ROUND_SECONDS * len(nodes)

    async def ask(rank: int) -> dict[str, Any] | Fault:
        try:
            await talks[rank].start()
            return await talks[rank].ask(
                "measure",
                seconds,
                rank=rank,
                world_size=len(nodes),
                address=inspection.master_address,
                port=inquiry.master_port,
                backend=backend,
            )
        except NoAnswer as error:
            return Fault(nodes[rank].name, "network", f"the measurement of links failed: it {error}.")

    try:
        answers = await asyncio.gather(*(ask(rank) for rank in range(len(nodes))))
    finally:
        await asyncio.gather(*(talk.close() for talk in talks))
    faults = [answer for answer in answers if isinstance(answer, Fault)]
    if faults:
        return faults
    told = [answer for answer in answers if not isinstance(answer, Fault)]
    rates = {
        (node.name, nodes[int(other)].name): rate
        for node, answer in zip(nodes, told, strict=True)
        for other, rate in answer["rates"].items()
    }
    return Links(backend, rates, min(answer["all_reduce"] for answer in told))


def link_speed_faults(links: Links, expected_bits: float | None) -> Iterator[Fault]:
    """Names the links below half of what is expected, or below half of what links reach here and the floor.

    Args:
        links: as measured.
        expected_bits: a second, of every link; None to compare the links with each other only.
    """
    least, reason = _SLOW * links.usual, f"half of the {_gbit(links.usual)} that links reach here"
    if expected_bits is not None:
        least, reason = _SLOW * expected_bits, f"half of the {_gbit(expected_bits)} that were expected"
    elif least < FLOOR_BITS:
        least, reason = FLOOR_BITS, f"{_gbit(FLOOR_BITS)}, half of the slowest network that clusters have"
    slow = {pair: rate for pair, rate in links.rates.items() if rate < least}
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

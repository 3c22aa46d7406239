"""Limits the connections from peers that have not yet authenticated, and the log lines about such peers."""

import ipaddress
from collections import Counter

from beit3_ds.cluster.launch.messages import Channel

_IPV6_NETWORK_BITS = 64  # a host may use any number of addresses of such a network
_FIRST_REFUSALS = 4  # these get a line each; later refusals get one when their number has doubled


class WaitingPeers:
    """Holds a limited number of connections (channels) from peers that have not yet authenticated.

    If there are too many channels, one is closed: the oldest channel of the network that has the most channels. A
    network is an IPv4 address or an IPv6 /64 network. So a stranger who opens many connections from one network usually
    displaces only connections from that network. If a guard (the parent process of a rank's training process) loses its
    connection in this way, the guard connects again.
    """

    def __init__(self, most: int) -> None:
        """Creates an empty collection.

        Args:
            most: maximum number of waiting channels.
        """
        self._most = most
        self._waiting: dict[Channel, str] = {}
        self._refused = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, channel: Channel) -> None:
        """Adds a new channel; if there are then too many, closes one.

        The closed channel is the oldest one from the IPv4 address or IPv6 /64 network that has the most channels.
        """
        self._waiting[channel] = _network(channel.peer_address)
        if len(self._waiting) > self._most:
            largest = Counter(self._waiting.values()).most_common(1)[0][0]
            oldest = next(other for other, network in self._waiting.items() if network == largest)
            del self._waiting[oldest]
            oldest.abort()

    def remove(self, channel: Channel) -> None:
        """Removes a channel after its peer has authenticated or was refused."""
        self._waiting.pop(channel, None)

    def describe_refusal(self, channel: Channel, reason: str) -> str | None:
        """Counts a refused peer, and returns a line for the log, or None.

        To keep the log short, most refusals get no line if there are many.
        """
        self._refused += 1
        if self._refused > _FIRST_REFUSALS and self._refused & (self._refused - 1):
            return None
        count = f" ({self._refused} so far; the next line comes at {2 * self._refused})"
        return (
            f"refused a connection from {channel.peer_address}: {reason}"
            f"{count if self._refused >= _FIRST_REFUSALS else ''}"
        )


def _network(address: str) -> str:
    """Returns an IPv4 address unchanged, or the /64 network of an IPv6 address.

    Returns an empty string if `address` is not an IP address.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""  # the peer is gone
    return address if found.version == 4 else str(ipaddress.ip_network((found, _IPV6_NETWORK_BITS), strict=False))

"""Limits the connections whose peers have yet to prove that they know the token, and the lines about refused peers."""

import ipaddress
from collections import Counter

from beit3_ds.cluster.launch.messages import Channel

_IPV6_NETWORK_BITS = 64  # a host may use any number of addresses of such a network
_FIRST_REFUSALS = 4  # each gets a line; later ones get a line whenever their number has doubled


class WaitingPeers:
    """Holds a limited number of channels whose peers have yet to prove that they know the token.

    If there are too many, the address with the most connections loses its oldest one. So a stranger replaces only its
    own connections. A guard at a stranger's address connects again.
    """

    def __init__(self, most: int) -> None:
        """Makes an empty collection.

        Args:
            most: largest number of channels that may wait.
        """
        self._most = most
        self._waiting: dict[Channel, str] = {}
        self._refused = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, channel: Channel) -> None:
        """Adds a new channel, and closes another one if too many wait."""
        self._waiting[channel] = _network(channel.peer_address)
        if len(self._waiting) > self._most:
            largest = Counter(self._waiting.values()).most_common(1)[0][0]
            oldest = next(other for other, network in self._waiting.items() if network == largest)
            del self._waiting[oldest]
            oldest.abort()

    def remove(self, channel: Channel) -> None:
        """Removes a channel whose peer has shown the token, or was refused."""
        self._waiting.pop(channel, None)

    def describe_refusal(self, channel: Channel, reason: str) -> str | None:
        """Counts a refused peer and returns a line about it; returns None in a flood, which would fill the log."""
        self._refused += 1
        if self._refused > _FIRST_REFUSALS and self._refused & (self._refused - 1):
            return None
        count = f" ({self._refused} so far; the next line comes at {2 * self._refused})"
        return (
            f"refused a connection from {channel.peer_address}: {reason}"
            f"{count if self._refused >= _FIRST_REFUSALS else ''}"
        )


def _network(address: str) -> str:
    """Returns an IPv4 address itself, and the network of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""  # the peer is gone
    return address if found.version == 4 else str(ipaddress.ip_network((found, _IPV6_NETWORK_BITS), strict=False))

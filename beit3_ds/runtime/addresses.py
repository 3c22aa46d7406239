"""Finds the network address at which rank 0 listens, and the network interfaces of this host."""

import ipaddress
import os
import socket

import psutil

from beit3_ds.config import ConfigError
from beit3_ds.runtime.launch_environment import Launch


def source_address(host: str, port: int) -> str:
    """Returns this host's source address for a connection to `host`; sends nothing to `host`."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0]).partition("%")[0]


def is_loopback(address: str) -> bool:
    """Returns whether an address is a loopback address, such as 127.0.0.1 or ::1."""
    return ipaddress.ip_address(address).is_loopback


def find_meeting_address(launch: Launch) -> str:
    """Returns the address at which this host reaches rank 0.

    Normally this is MASTER_ADDR or its IP address. There are two special cases:

    - MASTER_ADDR resolves to a loopback address, for example because Debian maps a host's own name to 127.0.1.1. The
      function assumes that rank 0 runs on this host. It returns the loopback address if all ranks run on this host, if
      MASTER_ADDR is the loopback address itself or `localhost`, or if this host has no outer IPv4 address. Otherwise,
      it returns this host's only outer IPv4 address.
    - This rank is rank 0, and MASTER_ADDR resolves to another host's address. The function returns this host's only
      outer IPv4 address.

    An outer address is neither loopback nor link-local. If GLOO_SOCKET_IFNAME is set, only the outer addresses of this
    interface count in the two special cases.

    Raises:
        OSError: if MASTER_ADDR cannot be resolved.
        ConfigError: if an outer IPv4 address is needed, but there are several. In the second special case, also if
            there is none.
    """
    assert launch.master_addr is not None
    found = socket.getaddrinfo(launch.master_addr, launch.master_port, type=socket.SOCK_STREAM)
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    outer = _outer_addresses()
    if here := [address for address in addresses if address in outer]:
        return here[0]
    loopback = [address for address in addresses if is_loopback(address)]
    if not loopback and launch.rank != 0:
        return launch.master_addr
    is_one_host = launch.local_size == launch.world_size
    if loopback and (is_one_host or launch.master_addr in (*loopback, "localhost")):
        return loopback[0]
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    choice = [address for address, name in outer.items() if ":" not in address and interface in (None, name)]
    if len(choice) == 1 or (loopback and not choice):
        return (choice or loopback)[0]
    own = ", ".join(choice) or "none of another interface"
    raise ConfigError(
        f"rank {launch.rank}: MASTER_ADDR={launch.master_addr} means {', '.join(addresses)} on its own host, where "
        f"other hosts cannot reach rank 0. This host's addresses: {own}. Set MASTER_ADDR to the address that all hosts "
        "reach, or GLOO_SOCKET_IFNAME to the interface of that address."
    )


def find_interface(address: str) -> str | None:
    """Returns the name of the network interface that has `address`, or None if this host has no such interface. Every
    loopback address belongs to the loopback interface.
    """
    for name, found in psutil.net_if_addrs().items():
        own = [entry.address.partition("%")[0] for entry in found if entry.family in (socket.AF_INET, socket.AF_INET6)]
        if address in own or (is_loopback(address) and any(map(is_loopback, own))):
            return name
    return None


def _outer_addresses() -> dict[str, str]:
    """Returns this host's addresses that are neither loopback nor link-local, each mapped to its network interface."""
    return {
        address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
        and not (found := ipaddress.ip_address(address := entry.address.partition("%")[0])).is_loopback
        and not found.is_link_local
    }

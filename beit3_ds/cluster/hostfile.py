"""Reads hostfiles, which list the machines of a run and the number of ranks per machine.

The rules are stricter than DeepSpeed's. DeepSpeed's parser reads `slots=2x` as 2, and accepts 0 slots and invalid host
names. A run would then fail later. This module reports the first invalid line with its line number.
"""

import io
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_ds.config.strict import ConfigError

MAX_SLOTS = 1024
"""Largest number of slots per host. No machine has more GPUs or cores, so a larger number is a typing error."""

_MAX_NAME = 253  # characters of a DNS name
_SHOWN = 100  # maximum characters of an invalid line in a message
_RESOLVE_SECONDS = 2.0  # for all names together: the check of addresses is not worth a longer wait
_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_LINE = re.compile(r"(?P<name>\S+)(?:\s+(?P<rest>.*))?")
_SLOTS = re.compile(r"slots=(?P<slots>[0-9]+)(?:\s+#.*)?")
_FORM = "Write one machine per line: NAME slots=RANKS, for example 'node0 slots=8'."


@dataclass(frozen=True)
class HostSlots:
    """Describes one line of a hostfile: a host and its number of ranks."""

    name: str
    """Host name or IPv4 address that ssh connects to."""
    slots: int
    """Number of ranks to start on the host; one per GPU on machines with GPUs."""


@dataclass(frozen=True)
class Hostfile:
    """Lists the machines of a run, in the order of their ranks."""

    path: Path
    """Path of the hostfile, for error messages."""
    hosts: tuple[HostSlots, ...]
    """Hosts with distinct names, in the order of their ranks; at least one host."""

    @property
    def world_size(self) -> int:
        """Returns the number of ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the host names in the order of the hostfile."""
        return tuple(host.name for host in self.hosts)

    @property
    def is_local(self) -> bool:
        """Returns whether the hostfile lists no host but this machine, under a loopback name. The run then needs no
        ssh.
        """
        return len(self.hosts) == 1 and is_loopback(self.hosts[0].name)

    def ranks(self, name: str) -> range:
        """Returns the global ranks that run on a host.

        Raises:
            KeyError: if no host has this name.
        """
        first = 0
        for host in self.hosts:
            if host.name == name:
                return range(first, first + host.slots)
            first += host.slots
        raise KeyError(name)

    def host_of(self, rank: int) -> HostSlots:
        """Returns the host that runs a global rank.

        Raises:
            IndexError: if the hostfile has no such rank.
        """
        first = 0
        for host in self.hosts:
            if first <= rank < first + host.slots:
                return host
            first += host.slots
        raise IndexError(rank)


def is_loopback(name: str) -> bool:
    """Returns whether a host name is localhost or 127.x.x.x, and so refers to the local machine."""
    return name.lower() in ("localhost", "localhost.localdomain") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", name))


def read_hostfile(path: str | Path) -> Hostfile:
    """Reads a hostfile, and checks that no two names resolve to the same address.

    Addresses are looked up for at most two seconds. Names that are not resolved by then are not checked.

    Raises:
        ConfigError: if the file cannot be read or breaks a rule. Each line must be `NAME slots=RANKS`, a comment or
            empty. There must be at least one host. No host may occur twice, and no two names may resolve to the same
            address. If localhost is listed, it must be the only host.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        # DeepSpeed would print a warning and train on this machine alone.
        raise ConfigError(f"hostfile {path} does not exist. {_FORM}") from None
    except OSError as error:
        raise ConfigError(f"hostfile {path} cannot be read: {error.strerror}. Name a readable file.") from error
    hostfile = parse_hostfile(_decode(data, path), path)
    _check_addresses(hostfile, _resolve(hostfile.names))
    return hostfile


def parse_hostfile(text: str, path: str | Path) -> Hostfile:
    """Parses the text of a hostfile without looking up the addresses of its hosts.

    Args:
        text: content of the hostfile.
        path: path of the hostfile, for error messages.

    Raises:
        ConfigError: if the text breaks a rule. Each line must be `NAME slots=RANKS`, a comment or empty. There must be
            at least one host, and no name may occur twice. If localhost is listed, it must be the only host.
    """
    path = Path(path)
    hosts: list[HostSlots] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"hostfile {path}, line {number}: {line if len(line) <= _SHOWN else line[:_SHOWN] + '...'!r}"
        host = _parse_line(line, where)
        key = host.name.lower()
        if key in line_of:
            raise ConfigError(
                f"{where}: host '{host.name}' is on line {line_of[key]} already (case does not matter in host names). "
                "Delete one of the two lines, or add their slots."
            )
        line_of[key] = number
        hosts.append(host)
    if not hosts:
        raise ConfigError(f"hostfile {path} names no machine: it has only empty lines and comments. {_FORM}")
    if len(hosts) > 1 and (loops := [host.name for host in hosts if is_loopback(host.name)]):
        raise ConfigError(
            f"hostfile {path}, line {line_of[loops[0].lower()]}: '{loops[0]}' means another machine on each of the "
            f"{len(hosts)} hosts. Write the name or address by which the others reach this machine."
        )
    return Hostfile(path, tuple(hosts))


def write_hostfile(path: str | Path, hosts: Sequence[HostSlots]) -> Hostfile:
    """Writes a hostfile that lists the given hosts, and returns the hostfile.

    Raises:
        ConfigError: if a host has an invalid name or number of slots, or if the file cannot be written.
    """
    path = Path(path)
    text = "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
    hostfile = parse_hostfile(text, path)
    if hostfile.hosts != tuple(hosts):
        raise ConfigError(f"hostfile {path}: {list(hosts)} would be read back as {list(hostfile.hosts)}. {_FORM}")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"hostfile {path} cannot be written: {error.strerror}. Name another file.") from error
    return hostfile


def _decode(data: bytes, path: Path) -> str:
    for mark, name in ((b"\xef\xbb\xbf", "UTF-8"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if data.startswith(mark):
            raise ConfigError(
                f"hostfile {path}, line 1: starts with the byte-order mark of {name}, which would become part of the "
                "first host's name. Save the file as UTF-8 without a byte-order mark."
            )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"hostfile {path}, line {line}: is not UTF-8 text ({error.reason}). {_FORM}") from error


def _parse_line(line: str, where: str) -> HostSlots:
    match = _LINE.fullmatch(line)
    assert match is not None, f"a stripped line does not start with a blank: {line!r}"
    name, rest = match["name"], match["rest"] or ""
    _check_name(name, where)
    if "slots" not in rest:
        raise ConfigError(f"{where}: the number of ranks is missing. {_FORM}")
    slots = _SLOTS.fullmatch(rest)
    if slots is None:
        raise ConfigError(
            f"{where}: the name must be followed by 'slots=' and a whole number, without blanks around '=', and then "
            f"only by a comment (' # ...'), not by {rest!r}. {_FORM}"
        )
    digits = slots["slots"].lstrip("0") or "0"
    if len(digits) > len(str(MAX_SLOTS)) or not 1 <= int(digits) <= MAX_SLOTS:
        shown = digits if len(digits) < 20 else f"a number of {len(digits)} digits"
        raise ConfigError(
            f"{where}: slots is {shown}; it must be between 1 and {MAX_SLOTS}. Write the number of the machine's GPUs, "
            "or delete the line if no rank is to run there."
        )
    return HostSlots(name, int(digits))


def _check_name(name: str, where: str) -> None:
    """Checks a host name. The error message explains how to fix common mistakes, such as a port in the name."""
    if len(name) <= _MAX_NAME and _NAME.fullmatch(name):
        return
    if "," in name or ";" in name:
        way_out = "Write one line per machine."
    elif "slots=" in name:
        way_out = f"The host name is missing. {_FORM}"
    elif "@" in name:
        way_out = "Name the user in ~/.ssh/config (Host, User), not in the hostfile."
    elif ":" in name:
        way_out = "Ports and numbers of ranks are not part of the name: write slots=, and ports into ~/.ssh/config."
    elif "[" in name:
        way_out = "Ranges are not expanded: write one line per machine."
    else:
        way_out = "Write the name that ssh accepts."
    raise ConfigError(
        f"{where}: '{name}' is not a host name, which has letters, digits, '-', '_' and '.', begins and ends with a "
        f"letter or digit and has at most {_MAX_NAME} characters. {way_out}"
    )


def _resolve(names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Returns the IP addresses of each host name that is resolved within two seconds, by name.

    All names are looked up at once. Each loopback address is replaced by "loopback".
    """
    found: dict[str, frozenset[str]] = {}

    def look_up(name: str) -> None:
        try:
            addresses = {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
        except OSError:
            return
        found[name] = frozenset("loopback" if _is_loopback_address(address) else address for address in addresses)

    # Daemon threads, because a name server that does not answer must not keep the process alive.
    threads = [threading.Thread(target=look_up, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _RESOLVE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found)


def _is_loopback_address(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _check_addresses(hostfile: Hostfile, addresses: Mapping[str, frozenset[str]]) -> None:
    names = [name for name in hostfile.names if name in addresses]
    owner: dict[str, str] = {}
    for name in names:
        for address in sorted(addresses[name]):
            other = owner.setdefault(address, name)
            if other != name:
                raise ConfigError(
                    f"hostfile {hostfile.path}: '{other}' and '{name}' are one machine: both resolve to {address}. "
                    "Two entries would start two sets of ranks there. Delete one of the two lines, or add their slots."
                )

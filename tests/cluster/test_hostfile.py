"""Tests which hostfiles are refused, the error messages, and that DeepSpeed reads accepted files equally."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.cluster import Hostfile, HostSlots, hostfile, parse_hostfile, read_hostfile, write_hostfile
from beit3_ds.config import ConfigError

FILE = "hosts.txt"

# What DeepSpeed 0.19.8 does with each was seen with its real launcher.
REFUSED = {
    # taken by DeepSpeed, and then a run that hangs or dies
    "no ranks": ("h0 slots=0", "slots is 0; it must be between 1 and 1024"),
    "a letter behind": ("h0 slots=2x", "not by 'slots=2x'"),
    "absurd": ("h0 slots=99999", "slots is 99999"),
    "absurd beyond int()": ("h0 slots=" + "9" * 5000, "a number of 5000 digits"),
    "byte-order mark": ("\ufeffh0 slots=2", "byte-order mark"),
    "list": ("h0,h1 slots=2", "Write one line per machine"),
    "shell": ("h0;id slots=2", "'h0;id' is not a host name"),
    "case": ("h0 slots=2\nH0 slots=2", "line 2: 'H0 slots=2': host 'H0' is on line 1 already"),
    "option of ssh": ("-oProxyCommand=id slots=2", "is not a host name"),
    "user": ("root@h0 slots=2", "~/.ssh/config"),
    "port": ("h0:22 slots=2", "Ports"),
    "range": ("h[0-3] slots=2", "Ranges are not expanded"),
    "other digits": ("h0 slots=٣", "a whole number"),
    "more behind": ("h0 slots=2 max_slots=4", "only by a comment"),
    "name too long": (f"{'h' * 254} slots=2", "at most 253"),
    "localhost among others": ("h0 slots=2\nlocalhost slots=2", "line 2: 'localhost' means another machine"),
    "loopback among others": ("127.0.0.1 slots=2\nh0 slots=2", "line 1: '127.0.0.1' means another machine"),
    # refused by DeepSpeed as well
    "no slots": ("h0", "number of ranks is missing"),
    "colon": ("host:2", "is not a host name"),
    "blanks": ("h0 slots = 2", "without blanks around '='"),
    "no number": ("h0 slots=", "a whole number"),
    "no name": ("slots=2", "The host name is missing"),
    "twice": ("h0 slots=2\nh0 slots=4", "is on line 1 already"),
    "comments only": ("# nobody\n\n  # home\n", "names no machine"),
    "empty": ("", "names no machine"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_files_are_refused_by_line_rule_and_way_out(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    message = str(error.value)
    assert words in message
    assert str(path) in message
    assert len(message) < 700


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"])
def test_editors_encodings_are_refused(mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(mark + "h0 slots=2\n".encode("utf-8" if mark == b"\xef\xbb\xbf" else "utf-16-le"))
    with pytest.raises(ConfigError, match="line 1: starts with the byte-order mark"):
        read_hostfile(path)
    path.write_bytes(b"h0 slots=2\nh\xe91 slots=2\n")
    with pytest.raises(ConfigError, match="line 2: is not UTF-8"):
        read_hostfile(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_hostfile(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_hostfile(tmp_path / "none" / "hosts", [HostSlots("h0", 1)])


def test_two_names_of_one_address_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"node0": "10.0.0.1", "node0-ib": "10.0.0.1", "node1": "10.0.0.2", "10.0.0.2": "10.0.0.2"}
    # Debian resolves a machine's own name to this address; it is one of the loopback ones.
    addresses |= {"head": "127.0.1.1", "head-again": "127.0.0.1"}

    def look_up(name: str, *_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if name not in addresses:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    path = tmp_path / FILE
    for pair in (("node0", "node0-ib"), ("node1", "10.0.0.2"), ("head", "head-again")):
        path.write_text("".join(f"{name} slots=1\n" for name in pair))
        with pytest.raises(ConfigError, match=f"'{pair[0]}' and '{pair[1]}' are one machine"):
            read_hostfile(path)
    path.write_text("node0 slots=1\nnode1 slots=1\nunknown slots=1\nother-unknown slots=1\n")
    assert read_hostfile(path).names == ("node0", "node1", "unknown", "other-unknown")


def test_a_name_server_that_hangs_costs_no_more_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: threading.Event().wait())
    monkeypatch.setattr(hostfile, "_RESOLVE_SECONDS", 0.05)
    path = tmp_path / FILE
    path.write_text("h0 slots=1\nh1 slots=1\n")
    assert read_hostfile(path).world_size == 2  # hangs here if the threads are waited for without a bound


def test_ranks_follow_the_order_of_lines() -> None:
    hosts = parse_hostfile("# rack 1\n\n b slots=2 # the head\r\na\tslots=03\n", FILE)
    assert hosts == Hostfile(Path(FILE), (HostSlots("b", 2), HostSlots("a", 3)))
    assert (hosts.world_size, hosts.names, hosts.is_local) == (5, ("b", "a"), False)
    assert (hosts.ranks("b"), hosts.ranks("a")) == (range(2), range(2, 5))
    assert [hosts.host_of(rank).name for rank in range(5)] == ["b", "b", "a", "a", "a"]
    with pytest.raises(KeyError):
        hosts.ranks("c")
    for rank in (-1, 5):
        with pytest.raises(IndexError):
            hosts.host_of(rank)
    assert parse_hostfile("localhost slots=2", FILE).is_local
    assert not parse_hostfile("localhost2 slots=2", FILE).is_local


LABELS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,8}[A-Za-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(".".join).filter(lambda name: not hostfile.is_loopback(name))
HOSTS = st.lists(
    st.builds(HostSlots, NAMES, st.integers(1, hostfile.MAX_SLOTS)),
    min_size=1,
    max_size=5,
    unique_by=lambda host: host.name.lower(),
)


@settings(deadline=None)
@given(HOSTS)
def test_written_files_are_read_back(tmp_path_factory: pytest.TempPathFactory, hosts: list[HostSlots]) -> None:
    path = tmp_path_factory.getbasetemp() / FILE
    assert write_hostfile(path, hosts).hosts == tuple(hosts)
    assert parse_hostfile(path.read_text(), path).hosts == tuple(hosts)


@pytest.mark.parametrize("host", [HostSlots("h 0", 1), HostSlots("h0", 0), HostSlots("#h", 1), HostSlots("", 1)])
def test_what_could_not_be_read_back_is_not_written(host: HostSlots, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_hostfile(tmp_path / FILE, [HostSlots("ok", 1), host])
    assert not (tmp_path / FILE).exists()


# Lines near the grammar, where two parsers could differ: blanks of all kinds, comments, digits of other scripts.
BLANKS = st.sampled_from([" ", "\t", "  ", "\u00a0", "\x0b", "\x0c", "\u2028", "\x85", "\x1c", "", "\ufeff"])
LINES = st.tuples(
    st.one_of(st.just(""), BLANKS),
    st.sampled_from(["h0", "h1", "H0", "a.b", "#", "# h2", "", "-h", "h:2", "h,i", "slots=1"]),
    BLANKS,
    st.sampled_from(["slots=2", "slots=08", "slots=٣", "slots = 2", "slots=2x", "slots=0", "slots=", "", "slots=3"]),
    st.sampled_from(["", "", " # c", "\t#", " x", "#", "\x0b# slots=4", " slots=4", "\u2028h9 slots=1"]),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n", ""]),
)
TEXTS = st.lists(LINES.map("".join), max_size=4).map("".join)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_deepspeed_reads_alike_whatever_is_accepted(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path_factory.getbasetemp() / FILE
    path.write_bytes(text.encode())
    with contextlib.suppress(ConfigError):
        ours = parse_hostfile(path.read_bytes().decode(), path)
        assert list(fetch_hostfile(str(path)).items()) == [(host.name, host.slots) for host in ours.hosts]


def test_reading_imports_neither_torch_nor_deepspeed() -> None:
    heavy = "{'torch', 'deepspeed', 'numpy'}"
    program = f"import sys, beit3_ds.cluster, beit3_ds.cli.main; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

"""Hosts that the tests of a file share."""

from collections.abc import Iterator

import pytest

from tests.hosts import Host, missing_for_hosts, namespace_hosts


@pytest.fixture(scope="module")
def _module_hosts() -> Iterator[list[Host]]:
    if reason := missing_for_hosts():
        pytest.skip(reason)
    with namespace_hosts(2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def debian_hosts() -> Iterator[list[Host]]:
    """Two hosts as Debian sets them up: their own names lead to the loopback, which is where gloo would listen."""
    if reason := missing_for_hosts():
        pytest.skip(reason)
    with namespace_hosts(2) as hosts:
        for host in hosts:
            host.add_name(f"127.0.1.1 {host.name}")
        yield hosts


@pytest.fixture
def two_hosts(_module_hosts: list[Host]) -> Iterator[list[Host]]:
    """Two hosts, shared by a file's tests; what a test leaves running is killed, and links are whole again.

    A test that crashes a host, stops its sshd or changes its names creates its own hosts: `namespace_hosts`.
    """
    yield _module_hosts
    for host in _module_hosts:
        host.clear()
        host.restore_link()
        host.throttle(None)

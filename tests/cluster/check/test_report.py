"""Tests the table of all hosts and the lines below it."""

from beit3_ds.cluster.check.fault import CHECKS, Fault
from beit3_ds.cluster.check.report import describe_faults, describe_nodes
from beit3_ds.cluster.hostfile import parse_hostfile
from tests.cluster.check.node_answers import healthy

HOSTFILE = parse_hostfile("a slots=1\nb slots=2\n", "hosts")


def test_no_fault_is_one_line() -> None:
    assert describe_faults(parse_hostfile("a slots=1\n", "hosts"), []) == "1 host, 1 rank: no fault found"


def test_notes_come_first_and_are_not_counted() -> None:
    faults = [Fault("a", "disk", "is full."), Fault("b", "network", "odd.", is_note=True)]
    assert describe_faults(HOSTFILE, faults) == "note: b: odd.\n2 hosts, 3 ranks, 1 fault:\n* a: is full."


def test_a_cell_is_marked_for_its_host_or_for_all() -> None:
    faults = [Fault("node1", "disk", ""), Fault("node2", "network", "", is_note=True), Fault("", "files", "")]
    head, *rows = describe_nodes(healthy(3), faults).splitlines()
    assert head.split() == ["host", "slots", *CHECKS]
    assert [row.count("!") for row in rows] == [1, 2, 1] and ["!2.0 GiB" in row for row in rows] == [False, True, False]
    assert ["~eth0" in row for row in rows] == [False, False, True]


def test_a_silent_node_has_empty_cells() -> None:
    inspection = healthy(1)
    node = inspection.answers[0]
    node.machine = node.software = node.gpus = node.files = node.clock = node.source_address = node.listener = None
    node.tokens_missing, node.disks = None, {}
    assert describe_nodes(inspection, []).splitlines()[1].split() == ["node0", "8", "none", *["-"] * 12]

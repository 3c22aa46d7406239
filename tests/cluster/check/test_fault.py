"""Tests names and sizes in the messages about faults."""

from beit3_ds.cluster.check.fault import Fault, join_names, show_bytes


def test_a_fault_names_its_host_if_it_has_one() -> None:
    assert str(Fault("node1", "disk", "is full.")) == "node1: is full."
    assert str(Fault("", "layout", "does not fit.")) == "does not fit."


def test_names_and_sizes_are_short() -> None:
    names = [f"n{i}" for i in range(6)]
    assert [join_names(names[:count]) for count in (0, 1, 2, 3, 6)] == [
        "none",
        "n0",
        "n0 and n1",
        "n0, n1 and n2",
        "n0, n1, n2 and 3 others",
    ]
    assert [show_bytes(size) for size in (10, 2**20, 1.5 * 2**30, 2**41)] == ["0 KiB", "1.0 MiB", "1.5 GiB", "2.0 TiB"]

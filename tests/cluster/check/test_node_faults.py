"""Tests the rules for single nodes: which node is at fault, and which values are accepted."""

from collections.abc import Callable
from typing import Any

import pytest

from beit3_ds.cluster.check.inspection import Answers
from beit3_ds.cluster.check.link_faults import find_link_faults
from beit3_ds.cluster.check.node_faults import find_node_faults
from beit3_ds.cluster.check.report import describe_nodes
from beit3_ds.cluster.check.requirements import Requirements
from tests.cluster.check.node_answers import all_faults, gpus, healthy, machine, versions


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_healthy_nodes_have_no_fault(count: int) -> None:
    inspection = healthy(count)
    requirements = Requirements(layout_fault=None, rank_bytes=(70 * 2**30,) * 8 * count, checkpoint_bytes=2**31)
    assert not all_faults(inspection) and not all_faults(inspection, requirements)


# What is planted on one node of four: the node, the change, words of the only fault.
PLANTED: dict[str, tuple[Callable[[Answers], Any], str]] = {
    "version": (lambda n: versions(n).update(torch="2.13.0"), "torch is 2.13.0, not 2.14.1 as on"),
    "no package": (lambda n: versions(n).update(deepspeed=None), "deepspeed is not installed"),
    "python": (lambda n: machine(n).update(python="3.12.1"), "python is 3.12, not 3.11 as on"),
    "a file more": (lambda n: n.software["code"].update({"beit3_ds/c.py": "2"}), "1 of the project's files differ"),
    "no folder": (lambda n: machine(n).update(folder_error="No such file or directory"), "cannot enter /home/me (No"),
    "fewer GPUs": (lambda n: gpus(n).pop(), "slots=8 in the hostfile, but nvidia-smi lists 7 GPUs"),
    "no nvidia-smi": (lambda n: gpus(n).clear(), "has no nvidia-smi and so no known GPU"),
    "driver": (
        lambda n: n.gpus.update(gpus=[], error="Driver/library version mismatch"),
        "nvidia-smi fails: Driver/lib",
    ),
    "busy GPU": (lambda n: gpus(n)[2].update(used=2**34), "16.0 GiB of GPU 2 are in use"),
    "full /tmp": (lambda n: n.disks["/tmp"].update(free=2**20), "1.0 MiB of 1.0 TiB are free on the disk of /tmp"),
    "no mount": (lambda n: n.disks.update({"output folder": {"error": "Stale file handle"}}), "Stale file handle"),
    "open files": (lambda n: machine(n).update(open_files=256), "may open 256 files"),
    "shared memory": (lambda n: machine(n).update(shared_memory=2**26), "/dev/shm has 64.0 MiB"),
    "clock ahead": (lambda n: setattr(n, "clock", 1003.0), "s ahead of that of"),
    "clock behind": (lambda n: setattr(n, "clock", 997.0), "s behind that of"),
    "interface": (lambda n: machine(n).update(gloo_interface="ib0"), "GLOO_SOCKET_IFNAME=ib0 is set, but"),
    "token": (lambda n: setattr(n, "token_error", "Permission denied"), "cannot write into /out"),
    "tokens": (lambda n: setattr(n, "tokens_missing", ("node0", "node1", "node2", "node3")), "do not see what"),
    "no data": (lambda n: n.files.update({"a-*.tar": (0, "")}), "no file matches 'a-*.tar' (from /home/me), unlike"),
    "other data": (
        lambda n: n.files.update({"a-*.tar": (3, "x")}),
        "the files of 'a-*.tar' differ in names or sizes",
    ),
    "silence": (lambda n: setattr(n, "silence", "cannot be reached by ssh"), "it cannot"[3:]),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(("plant", "words"), PLANTED.values(), ids=PLANTED)
def test_the_odd_one_of_four_is_blamed_wherever_it_is(place: int, plant: Callable[[Answers], Any], words: str) -> None:
    inspection = healthy(4)
    plant(inspection.answers[place])
    (fault,) = all_faults(inspection)
    assert fault.startswith(f"node{place}: ") and words in fault and fault.endswith("."), fault
    assert (
        describe_nodes(inspection, [*find_node_faults(inspection, None), *find_link_faults(inspection)]).count("!") == 1
    )


def test_of_two_that_differ_the_second_is_blamed() -> None:
    inspection = healthy(2)
    for node, other in zip(inspection.answers, ("node1", "node0"), strict=True):
        node.tokens_missing = (other,)
    (fault,) = all_faults(inspection)
    assert fault.startswith("node1: and node0 do not see what the other wrote into /out")
    for plant in ("version", "a file more", "clock ahead"):
        for place in (0, 1):
            inspection = healthy(2)
            PLANTED[plant][0](inspection.answers[place])
            (fault,) = all_faults(inspection)
            assert fault.startswith("node1: "), fault


def test_a_run_must_fit_gpus_and_disk() -> None:
    inspection = healthy(2)
    rank_bytes = [10 * 2**30] * 15 + [73 * 2**30]  # of 80
    (fault,) = all_faults(inspection, Requirements(layout_fault=None, rank_bytes=tuple(rank_bytes)))
    assert fault.startswith("node1: rank 15 needs 73.0 GiB by the model of memory, more than 90% of the 80.0 GiB")
    few = Requirements(layout_fault=None, rank_bytes=(0,) * 16, checkpoint_bytes=2**31 + 1)
    assert ["one checkpoint needs 2.0 GiB" in fault for fault in all_faults(inspection, few)] == [True, True]
    for node in inspection.answers:
        gpus(node)[0]["total"] = None  # what nvidia-smi does not know is not compared
    assert not all_faults(inspection, Requirements(layout_fault=None, rank_bytes=(2**40, *[0] * 7) * 2))

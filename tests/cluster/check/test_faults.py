"""Rules over what nodes say: whom they blame in a cluster of many, and what they let pass."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cluster.check.fault import join_names, show_bytes
from beit3_ds.cluster.check.inspection import Answers, Inquiry, Inspection
from beit3_ds.cluster.check.link_faults import link_faults
from beit3_ds.cluster.check.node_faults import node_faults
from beit3_ds.cluster.check.probe import parse_gpus
from beit3_ds.cluster.check.report import describe_faults, describe_nodes
from beit3_ds.cluster.check.requirements import Requirements, named_files, work_out_requirements
from beit3_ds.cluster.hostfile import parse_hostfile
from beit3_ds.config import load_run_config
from beit3_ds.training.optimizer import decays

GPU = {"name": "NVIDIA H100 80GB HBM3", "total": 80 * 2**30, "used": 4 * 2**20}
# What nvidia-smi prints for --query-gpu=name,memory.total,memory.used --format=csv,noheader,nounits: recorded text from
# its documentation and from reports of users; none of it was seen on a GPU of ours.
RECORDED = {
    "two GPUs": ("NVIDIA H100 80GB HBM3, 81559, 4\nNVIDIA H100 80GB HBM3, 81559, 61440\n", [81559, 81559], [4, 61440]),
    "a comma in the name": ("Quadro RTX 6000, passive, 24220, 0\n", [24220], [0]),
    "numbers that it does not know": ("NVIDIA GB10, [N/A], [N/A]\n", [None], [None]),
    "none": ("\n", [], []),
}


@pytest.mark.parametrize(("text", "total", "used"), RECORDED.values(), ids=RECORDED)
def test_recorded_lists_of_gpus_are_read(text: str, total: list[int | None], used: list[int | None]) -> None:
    gpus = parse_gpus(text)
    assert [gpu["total"] and gpu["total"] // 2**20 for gpu in gpus] == total
    assert [None if gpu["used"] is None else gpu["used"] // 2**20 for gpu in gpus] == used


def healthy(count: int, slots: int = 8) -> Inspection:
    """What `count` nodes say when all is well."""
    names = [f"node{index}" for index in range(count)]
    answers = [
        Answers(
            name=name,
            slots=slots,
            machine={
                "hostname": name,
                "identity": [f"boot{index}", "net"],
                "folder_error": None,
                "python": f"3.11.{index % 2}",  # may differ
                "open_files": 1024,
                "shared_memory": 2**30,
                "cores": 8,
                "addresses": [f"10.0.0.{index + 1}"],
                "interfaces": ["lo", "eth0"],
                "own_name": f"10.0.0.{index + 1}",
                "gloo_interface": None,
            },
            software={
                "versions": {"torch": "2.14.1", "deepspeed": "0.19.8", "beit3_ds": "0.1.0"},
                "code": {"beit3_ds/a.py": "0", "beit3_ds/b.py": "1"},
            },
            gpus={"gpus": [dict(GPU) for _ in range(slots)], "error": None},
            disks={"/tmp": {"free": 2**31, "total": 2**40}, "output folder": {"free": 2**31, "total": 2**40}},
            files={"a-*.tar": (3, "digest"), "words.spm": (0, "none")},
            clock=1000 + 0.4 * (index % 2),  # the asking machine is wrong: only they must agree
            clock_error=0.01,
            tokens_missing=(),
            listener={"wanted": 29500 if index == 0 else 0, "port": 29500 if index == 0 else 40000, "owner": None},
            connections={other: {"own": "", "interface": "eth0"} for other in names},
            own_address=f"10.0.0.{index + 1}",
            interface="eth0",
        )
        for index, name in enumerate(names)
    ]
    return Inspection(
        inquiry=Inquiry(
            folder=Path("/home/me"),
            output_dir=Path("/out/run"),
            files={"a-*.tar": True, "words.spm": False},
            master_port=29500,
            environment={},
        ),
        answers=tuple(copy.deepcopy(answers)),
        master_address="10.0.0.1",
        named_master={name: {"own": ""} for name in names},
        shared_folder="/out",
    )


def all_faults(inspection: Inspection, needs: Requirements | None = None) -> list[str]:
    return [str(fault) for fault in (*node_faults(inspection, needs), *link_faults(inspection))]


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_healthy_nodes_have_no_fault(count: int) -> None:
    inspection = healthy(count)
    needs = Requirements(layout_fault=None, rank_bytes=(70 * 2**30,) * 8 * count, checkpoint_bytes=2**31)
    assert not all_faults(inspection) and not all_faults(inspection, needs)


def versions(node: Answers) -> dict[str, Any]:
    assert node.software is not None
    return node.software["versions"]


def machine(node: Answers) -> dict[str, Any]:
    assert node.machine is not None
    return node.machine


def gpus(node: Answers) -> list[dict[str, Any]]:
    assert node.gpus is not None
    return node.gpus["gpus"]


# What is planted on one node of four: the node, the change, words of the only fault.
PLANTED: dict[str, tuple[Callable[[Answers], Any], str]] = {
    "version": (lambda n: versions(n).update(torch="2.13.0"), "torch is 2.13.0, not 2.14.1 as on"),
    "no package": (lambda n: versions(n).update(deepspeed=None), "deepspeed is not installed"),
    "python": (lambda n: machine(n).update(python="3.12.1"), "python is 3.12, not 3.11 as on"),
    "a file more": (lambda n: n.software["code"].update({"beit3_ds/c.py": "2"}), "1 of the project's files differ"),
    "no folder": (lambda n: machine(n).update(folder_error="No such file or directory"), "cannot enter /home/me (No"),
    "fewer GPUs": (lambda n: gpus(n).pop(), "slots=8 in the hostfile, but nvidia-smi lists 7 GPUs"),
    "no nvidia-smi": (lambda n: gpus(n).clear(), "has no nvidia-smi, so no GPU that is known of"),
    "driver": (
        lambda n: n.gpus.update(gpus=[], error="Driver/library version mismatch"),
        "nvidia-smi fails: Driver/lib",
    ),
    "busy GPU": (lambda n: gpus(n)[2].update(used=2**34), "16.0 GiB of GPU 2 are in use"),
    "full /tmp": (lambda n: n.disks["/tmp"].update(free=2**20), "1.0 MiB of 1.0 TiB are free where /tmp lies"),
    "no mount": (lambda n: n.disks.update({"output folder": {"error": "Stale file handle"}}), "Stale file handle"),
    "open files": (lambda n: machine(n).update(open_files=256), "may open 256 files"),
    "shared memory": (lambda n: machine(n).update(shared_memory=2**26), "/dev/shm holds 64.0 MiB"),
    "clock ahead": (lambda n: setattr(n, "clock", 1003.0), "s ahead of that of"),
    "clock behind": (lambda n: setattr(n, "clock", 997.0), "s behind that of"),
    "interface": (lambda n: machine(n).update(gloo_interface="ib0"), "GLOO_SOCKET_IFNAME=ib0 is set, but"),
    "token": (lambda n: setattr(n, "token_error", "Permission denied"), "cannot write into /out"),
    "tokens": (lambda n: setattr(n, "tokens_missing", ("node0", "node1", "node2", "node3")), "do not see what"),
    "no data": (lambda n: n.files.update({"a-*.tar": (0, "")}), "no file matches 'a-*.tar' (from /home/me), but on"),
    "other data": (
        lambda n: n.files.update({"a-*.tar": (3, "x")}),
        "the files of 'a-*.tar' differ in names or sizes",
    ),
    "silence": (lambda n: setattr(n, "silence", "cannot be reached by ssh"), "it cannot"[3:]),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(("plant", "words"), PLANTED.values(), ids=PLANTED)
def test_the_odd_one_of_four_is_blamed_wherever_it_stands(
    place: int, plant: Callable[[Answers], Any], words: str
) -> None:
    inspection = healthy(4)
    plant(inspection.answers[place])
    (fault,) = all_faults(inspection)
    assert fault.startswith(f"node{place}: ") and words in fault and fault.endswith("."), fault
    assert describe_nodes(inspection, [*node_faults(inspection, None), *link_faults(inspection)]).count("!") == 1


@pytest.mark.parametrize(("address", "words"), [(None, "does not resolve"), ("::1", "resolves to ::1")])
def test_an_own_name_that_others_cannot_use_is_noted_if_ranks_get_by(address: str | None, words: str) -> None:
    inspection = healthy(2)
    machine(inspection.answers[1])["own_name"] = address
    (note,) = link_faults(inspection)
    assert note.is_note and note.host == "node1" and f"'node1' {words} there" in note.text
    assert "~eth0 10.0.0.2" in describe_nodes(inspection, [note])
    said = describe_faults(parse_hostfile("a slots=1\n", "hosts"), [note])
    assert said.startswith("note: node1: ") and said.endswith("no fault found")
    inspection.answers[1].interface = None  # nobody knows which to take
    (fault,) = link_faults(inspection)
    assert not fault.is_note and "set GLOO_SOCKET_IFNAME" in fault.text


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


def test_two_sides_that_do_not_share_are_told_by_the_smaller() -> None:
    inspection = healthy(5)
    sides = ("node0", "node1"), ("node2", "node3", "node4")
    for node in inspection.answers:
        node.tokens_missing = sides[0] if node.name in sides[1] else sides[1]
    assert [fault.split(":")[0] for fault in all_faults(inspection)] == ["node0", "node1"]


def test_connections_that_fail_are_told_once_a_node_or_once_a_pair() -> None:
    inspection = healthy(4)
    for name in ("node0", "node1", "node3"):
        inspection.answers[["node0", "node1", "node2", "node3"].index(name)].connections["node2"] = {
            "error": "no route"
        }
    (fault,) = all_faults(inspection)
    assert fault.startswith("node2: no other node can connect to it (10.0.0.3, port 40000): no route.")

    inspection = healthy(4)
    inspection.answers[1].connections["node2"] = {"error": "no answer within 3 s"}
    (fault,) = all_faults(inspection)
    assert fault.startswith("node1: cannot connect to node2 (10.0.0.3, port 40000): no answer within 3 s. Open all")

    inspection = healthy(2)
    inspection.answers[1].connections["node0"] = {"error": "no route"}
    inspection.named_master["node1"]["error"] = "no route"  # neither by its name
    (fault,) = all_faults(inspection)
    assert "DeepSpeed's MASTER_ADDR" in fault and "--master_addr" not in fault


def test_one_machine_in_two_lines_is_told() -> None:
    inspection = healthy(3)
    machine(inspection.answers[2])["identity"] = machine(inspection.answers[0])["identity"]
    (fault,) = all_faults(inspection)
    assert fault.startswith("node2: is the same machine as node0")
    for node in inspection.answers:
        machine(node)["identity"] = [None, "net"]  # not known: nothing is said
    assert not all_faults(inspection)


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


def test_needs_follow_from_the_config_and_the_hostfile() -> None:
    config = load_run_config("ds_configs/demo_tp2_pp2_dp2_zero3.json")
    needs = work_out_requirements(config, parse_hostfile("a slots=4\nb slots=4\n", "hosts"), decays)
    assert needs.layout_fault is None and not needs.faults() and len(needs.rank_bytes) == 8
    # Ranks 0 to 3 hold the first stage.
    assert len(set(needs.rank_bytes[:4])) == len(set(needs.rank_bytes[4:])) == 1 < len(set(needs.rank_bytes))
    files = named_files(config)
    assert files["beit3_ds/sample_data/images-train.tar"] and not files[config.tokenizers.text.path]
    alone = work_out_requirements(config, parse_hostfile("a slots=3\n", "hosts"), decays)
    assert len(alone.faults()) == 1 and "does not divide world_size=3" in str(alone.faults()[0])


def test_data_that_no_node_has_is_told_once_and_a_tokenizer_may_still_be_trained() -> None:
    inspection = healthy(3)
    for node in inspection.answers:
        assert node.files is not None
        node.files["a-*.tar"] = (0, "")
    (fault,) = all_faults(inspection)
    assert fault.startswith("no node has files that match 'a-*.tar' (from /home/me). Correct")
    table = describe_nodes(inspection, list(link_faults(inspection)))
    assert table.count("!0") == 3
    inspection = healthy(3)
    for node in inspection.answers[:2]:
        assert node.files is not None
        node.files["words.spm"] = (1, "trained")
    (fault,) = all_faults(inspection)
    assert fault.startswith("node2: no file matches 'words.spm' (from /home/me), but on other nodes")


def test_words() -> None:
    names = [f"n{i}" for i in range(6)]
    assert [join_names(names[:count]) for count in (0, 1, 2, 3, 6)] == [
        "none",
        "n0",
        "n0 and n1",
        "n0, n1 and n2",
        "n0, n1, n2 and 3 others",
    ]
    assert [show_bytes(size) for size in (10, 2**20, 1.5 * 2**30, 2**41)] == ["0 KiB", "1.0 MiB", "1.5 GiB", "2.0 TiB"]
    assert describe_faults(parse_hostfile("a slots=1\n", "hosts"), []) == "1 host, 1 rank: no fault found"

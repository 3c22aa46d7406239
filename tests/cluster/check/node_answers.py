"""Builds the answers of healthy nodes, into which tests put faults."""

import copy
from pathlib import Path
from typing import Any

from beit3_ds.cluster.check.inspection import Answers, Inquiry, Inspection
from beit3_ds.cluster.check.link_faults import find_link_faults
from beit3_ds.cluster.check.node_faults import find_node_faults
from beit3_ds.cluster.check.requirements import Requirements

GPU = {"name": "NVIDIA H100 80GB HBM3", "total": 80 * 2**30, "used": 4 * 2**20}


def healthy(count: int, slots: int = 8) -> Inspection:
    """Returns the answers of `count` healthy nodes."""
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
            source_address=f"10.0.0.{index + 1}",
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


def all_faults(inspection: Inspection, requirements: Requirements | None = None) -> list[str]:
    return [str(fault) for fault in (*find_node_faults(inspection, requirements), *find_link_faults(inspection))]


def versions(node: Answers) -> dict[str, Any]:
    assert node.software is not None
    return node.software["versions"]


def machine(node: Answers) -> dict[str, Any]:
    assert node.machine is not None
    return node.machine


def gpus(node: Answers) -> list[dict[str, Any]]:
    assert node.gpus is not None
    return node.gpus["gpus"]

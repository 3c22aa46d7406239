"""Finds faults of single nodes. Compares each node with fixed limits, and with the majority of the nodes."""

import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

from beit3_ds.cluster.check.fault import Fault, join_names, show_bytes
from beit3_ds.cluster.check.inspection import Answers, Inspection
from beit3_ds.cluster.check.requirements import Requirements

T = TypeVar("T", bound=Hashable)

CLOCK_SECONDS = 1.0
"""Maximum allowed difference between two nodes' clocks in seconds. NTP keeps clocks within milliseconds."""
_FREE_BYTES = 2**30  # minimum free space in /tmp and the output folder, for compiled kernels and logs
_BUSY_GPU_BYTES = 2**30  # a running program uses more than this, and the driver alone uses less
_GPU_SHARE = 0.9  # largest modelled share of memory: CUDA's context, NCCL's buffers and fragmentation are not modelled
_OPEN_FILES = 1024  # Linux's default; connections to all peers and data files need descriptors
_SHARED_MEMORY_BYTES = 2**30  # what NVIDIA requires of containers for NCCL; Docker gives 64 MiB


def find_node_faults(inspection: Inspection, requirements: Requirements | None) -> Iterator[Fault]:
    """Yields the faults of single nodes, check by check. Each check skips the nodes that did not answer its question.

    Args:
        inspection: answers of all nodes.
        requirements: memory and disk space that the run needs; None without a run config.
    """
    yield from _silence(inspection)
    yield from _folder(inspection)
    yield from _software(inspection)
    yield from _code(inspection)
    yield from _gpus(inspection, requirements)
    yield from _disks(inspection, requirements)
    yield from _limits(inspection)
    yield from _clocks(inspection)


def majority(values: Mapping[str, T]) -> tuple[T, list[str]]:
    """Returns the most common value, and the hosts that have it. Of equally common values, the first wins."""
    counts = Counter(values.values())  # keeps the order, so on a tie max returns the first
    most = max(counts, key=lambda value: counts[value])
    return most, [name for name, value in values.items() if value == most]


def _silence(inspection: Inspection) -> Iterator[Fault]:
    for node in inspection.answers:
        if node.silence is None:
            continue
        if node.machine is not None:
            way_out = "A file system, driver or service hangs there: log in and find out which."
        elif "no Python" in node.silence:
            way_out = "Install the same environment at the same place on every node, or share it."
        elif "Host key verification" in node.silence:
            way_out = f"Accept its key once: 'ssh {node.name}'."
        else:
            way_out = f"This command must print nothing and ask nothing: 'ssh -oBatchMode=yes {node.name} true'."
        yield Fault(node.name, "answer", f"{node.silence}. {way_out}")


def _folder(inspection: Inspection) -> Iterator[Fault]:
    folder = inspection.inquiry.folder
    for node in inspection.answers:
        if node.machine and node.machine["folder_error"]:
            yield Fault(
                node.name,
                "code",
                f"cannot enter {folder} ({node.machine['folder_error']}), from where the launcher starts ranks on "
                "every node. Put the project at the same place there, or share it.",
            )


def _software(inspection: Inspection) -> Iterator[Fault]:
    versions = {
        node.name: {"python": _minor(node), **node.software["versions"]}
        for node in inspection.answers
        if node.machine and node.software
    }
    for package in ("python", "torch", "deepspeed", "beit3_ds"):
        found = {name: of_host[package] for name, of_host in versions.items()}
        for name, version in found.items():
            if version is None:
                way_out = f"Install it there: {sys.executable} -m pip install {package}."
                yield Fault(name, _column(package), f"{package} is not installed at {sys.executable}. {way_out}")
        present = {name: version for name, version in found.items() if version is not None}
        if not present:
            continue
        usual, having = majority(present)
        for name, version in present.items():
            if version != usual:
                yield Fault(
                    name,
                    _column(package),
                    f"{package} is {version}, not {usual} as on {join_names(having)}. "
                    f"All ranks must run the same version: install {package} {usual} there.",
                )


def _minor(node: Answers) -> str:
    assert node.machine is not None
    return ".".join(node.machine["python"].split(".")[:2])  # bytecode and wheels depend on these two numbers


def _column(package: str) -> str:
    return "code" if package == "beit3_ds" else package


def _code(inspection: Inspection) -> Iterator[Fault]:
    code = {node.name: node.software["code"] for node in inspection.answers if node.software and node.software["code"]}
    if not code:
        return
    usual, having = majority({name: frozenset(files.items()) for name, files in code.items()})
    for name, files in code.items():
        if name in having:
            continue
        differing = sorted({path for path, _ in usual ^ frozenset(files.items())})
        yield Fault(
            name,
            "code",
            f"{len(differing)} of the project's files differ from those of {join_names(having)}: "
            f"{join_names(differing)}. All ranks must run the same code: check out the same commit everywhere.",
        )


def _gpus(inspection: Inspection, requirements: Requirements | None) -> Iterator[Fault]:
    nodes = [node for node in inspection.answers if node.gpus is not None]
    any_gpus = any(node.gpus["gpus"] for node in nodes if node.gpus)
    first = 0
    for node in inspection.answers:
        ranks, first = range(first, first + node.slots), first + node.slots
        if node.gpus is None:
            continue
        gpus, error = node.gpus["gpus"], node.gpus["error"]
        if error:
            yield Fault(node.name, "GPUs", f"nvidia-smi fails: {error}. Fix the driver there, or reboot the node.")
        elif any_gpus and not gpus:
            yield Fault(
                node.name,
                "GPUs",
                "has no nvidia-smi and so no known GPU, but other nodes have GPUs. Remove its line from the hostfile, "
                "or install the driver.",
            )
        elif node.slots > len(gpus) > 0:
            yield Fault(
                node.name,
                "GPUs",
                f"slots={node.slots} in the hostfile, but nvidia-smi lists {len(gpus)} GPUs. Each rank needs a GPU of "
                f"its own: write slots={len(gpus)}, or find GPUs that fell off the bus.",
            )
        for index, gpu in enumerate(gpus[: node.slots]):
            if (gpu["used"] or 0) > _BUSY_GPU_BYTES:
                yield Fault(
                    node.name,
                    "GPUs",
                    f"{show_bytes(gpu['used'])} of GPU {index} are in use before the run starts. It must be free: end "
                    "the processes that nvidia-smi shows there.",
                )
        if requirements is not None and requirements.rank_bytes:
            yield from _gpu_memory(node, gpus, ranks, requirements.rank_bytes)


def _gpu_memory(node: Answers, gpus: list[dict], ranks: range, rank_bytes: tuple[int, ...]) -> Iterator[Fault]:
    """Yields a fault if a rank on this node needs too large a share of the memory of its GPU.

    If several ranks do so, the fault names the rank with the largest share.
    """
    pairs = [
        (rank_bytes[rank] / gpu["total"], rank, gpu) for rank, gpu in zip(ranks, gpus, strict=False) if gpu["total"]
    ]
    if not pairs:
        return
    share, rank, gpu = max(pairs, key=lambda pair: pair[0])
    if share > _GPU_SHARE:
        yield Fault(
            node.name,
            "GPUs",
            f"rank {rank} needs {show_bytes(rank_bytes[rank])} by the model of memory, more than {_GPU_SHARE:.0%} of "
            f"the {show_bytes(gpu['total'])} of its {gpu['name']}. Divide the model over more ranks, raise the ZeRO "
            "stage, or set training.activation_checkpointing=full; 'beit3 check' shows the parts.",
        )


def _disks(inspection: Inspection, requirements: Requirements | None) -> Iterator[Fault]:
    for node in inspection.answers:
        for purpose, disk in node.disks.items():
            where = inspection.inquiry.disks[purpose]
            if "error" in disk:
                yield Fault(node.name, "disk", f"the disk of {where} cannot be read: {disk['error']}. Mount it.")
                continue
            least, reason = _FREE_BYTES, "temporary files and logs need"
            if purpose != "/tmp" and requirements is not None and requirements.checkpoint_bytes > least:
                least, reason = requirements.checkpoint_bytes, "one checkpoint needs"
            if disk["free"] < least:
                yield Fault(
                    node.name,
                    "disk",
                    f"{show_bytes(disk['free'])} of {show_bytes(disk['total'])} are free on the disk of {where}, but "
                    f"{reason} {show_bytes(least)}. Delete something there, or name another folder.",
                )


def _limits(inspection: Inspection) -> Iterator[Fault]:
    for node in inspection.answers:
        if node.machine is None:
            continue
        if node.machine["open_files"] < _OPEN_FILES:
            yield Fault(
                node.name,
                "limits",
                f"a process may open {node.machine['open_files']} files, but connections and data need {_OPEN_FILES}. "
                "Raise 'nofile' in /etc/security/limits.conf (for ssh sessions too) and check with: "
                f"ssh {node.name} ulimit -n.",
            )
        shared_memory = node.machine["shared_memory"]
        if node.gpus and node.gpus["gpus"] and shared_memory is not None and shared_memory < _SHARED_MEMORY_BYTES:
            yield Fault(
                node.name,
                "limits",
                f"/dev/shm has {show_bytes(shared_memory)}, but NCCL needs {show_bytes(_SHARED_MEMORY_BYTES)}. Start "
                "the container with --shm-size=1g or --ipc=host, or remount /dev/shm.",
            )


def _clocks(inspection: Inspection) -> Iterator[Fault]:
    clocks = {node.name: node.clock for node in inspection.answers if node.clock is not None}
    errors = {node.name: node.clock_error for node in inspection.answers}
    if not clocks:
        return

    def near(name: str) -> list[str]:
        return [
            other
            for other in clocks
            if abs(clocks[other] - clocks[name]) <= CLOCK_SECONDS + errors[other] + errors[name]
        ]

    reference = max(clocks, key=lambda name: len(near(name)))  # on a tie, the first
    agreeing = near(reference)
    for name, clock in clocks.items():
        if name not in agreeing:
            ahead = clock - clocks[reference]
            way = "ahead of" if ahead > 0 else "behind"
            yield Fault(
                name,
                "clock",
                f"its clock is {abs(ahead):.1f} s {way} that of {join_names(agreeing)}; "
                f"at most {CLOCK_SECONDS:g} s is allowed. Start NTP there (timedatectl set-ntp true).",
            )

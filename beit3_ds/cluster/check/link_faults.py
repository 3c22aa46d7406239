"""Finds faults of host names, the master port, connections, the shared folder and input files."""

import ipaddress
from collections.abc import Iterator, Sequence

from beit3_ds.cluster.check.fault import Fault, join_names
from beit3_ds.cluster.check.inspection import Answers, Inspection
from beit3_ds.cluster.check.node_faults import majority
from beit3_ds.cluster.hostfile import is_loopback


def find_link_faults(inspection: Inspection) -> Iterator[Fault]:
    """Yields faults of host names, the master port, the shared folder, input files, and connections between nodes.

    Also yields a fault if two nodes are the same machine.
    """
    yield from _one_machine(inspection)
    yield from _own_names(inspection)
    yield from _master_port(inspection)
    yield from _connections(inspection)
    yield from _shared_folder(inspection)
    yield from _files(inspection)


def _one_machine(inspection: Inspection) -> Iterator[Fault]:
    owner: dict[tuple[str, ...], str] = {}
    for node in inspection.answers:
        if node.machine is None or None in node.machine["identity"]:
            continue
        other = owner.setdefault(tuple(node.machine["identity"]), node.name)
        if other != node.name:
            yield Fault(
                node.name,
                "answer",
                f"is the same machine as {other} (hostname {node.machine['hostname']}): two sets of ranks would start "
                "there. Delete one of the two lines of the hostfile, or add their slots.",
            )


def _own_names(inspection: Inspection) -> Iterator[Fault]:
    """Yields a fault for each node whose own host name does not resolve, or resolves to a loopback address.

    By default, gloo announces the address of the host name to the other nodes. If GLOO_SOCKET_IFNAME is set on a node,
    its host name is not checked. Instead, the node has a fault if the interface in GLOO_SOCKET_IFNAME does not exist.
    With only one node, nothing is checked.
    """
    if len(inspection.answers) == 1:
        return
    for node in inspection.answers:
        if node.machine is None:
            continue
        hostname, address = node.machine["hostname"], node.machine["own_name"]
        interface = node.machine["gloo_interface"]
        if interface is not None:
            if interface not in node.machine["interfaces"]:
                yield Fault(
                    node.name,
                    "network",
                    f"GLOO_SOCKET_IFNAME={interface} is set, but its interfaces are "
                    f"{', '.join(node.machine['interfaces'])}. Name one that every node has.",
                )
        elif address is None or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            found = "does not resolve" if address is None else f"resolves to {address}"
            text = f"its own name '{hostname}' {found} there, which no other node can reach. "
            if node.interface in (None, "lo"):
                text += (
                    "Gloo would announce that address to them ('connectFullMesh ... Connection refused'). Give "
                    f"'{hostname}' its real address in /etc/hosts, or set GLOO_SOCKET_IFNAME."
                )
            else:  # `runtime.rendezvous` makes gloo use this interface
                text += (
                    f"Ranks of beit3_ds let gloo use {node.interface} by themselves; other programs fail "
                    f"('connectFullMesh ... Connection refused') until '{hostname}' has its real address in /etc/hosts."
                )
            yield Fault(node.name, "network", text, is_note=node.interface not in (None, "lo"))


def _master_port(inspection: Inspection) -> Iterator[Fault]:
    first = inspection.answers[0]
    if first.listener and first.listener["owner"]:
        port = inspection.inquiry.master_port
        yield Fault(
            first.name,
            "port",
            f"port {port}, on which rank 0 listens, is taken by {first.listener['owner']}. End it, or give the "
            "launcher another --master_port.",
        )


def _connections(inspection: Inspection) -> Iterator[Fault]:
    first = inspection.answers[0]
    if is_loopback(first.name):
        return  # DeepSpeed then uses 127.0.0.1
    if first.machine and inspection.master_address is None:
        yield Fault(
            first.name,
            "network",
            "'hostname -I' prints no address there; DeepSpeed takes the first one for MASTER_ADDR. Give the launcher "
            "--master_addr ADDRESS.",
        )
    for callee in inspection.answers:
        errors = {
            caller.name: caller.connections[callee.name]["error"]
            for caller in inspection.answers
            if "error" in caller.connections.get(callee.name, {})
        }
        if not errors:
            continue
        assert callee.machine is not None and callee.listener is not None
        address = f"{callee.machine['addresses'][0]}, port {callee.listener['port']}"
        way_out = "Open all ports between the nodes (gloo and NCCL use any), and check routes and cables."
        if callee is first:
            address += ", its first address by 'hostname -I' and so DeepSpeed's MASTER_ADDR"
            if all("error" not in inspection.named_master.get(name, {"error": ""}) for name in errors):
                way_out = f"It can be reached by its name: give the launcher --master_addr {first.name}."
        callers = [node.name for node in inspection.answers if callee.name in node.connections and node is not callee]
        if len(callers) > 1 and set(errors) >= set(callers):
            error = next(iter(errors.values()))
            yield Fault(callee.name, "network", f"no other node can connect to it ({address}): {error}. {way_out}")
        else:
            for caller, error in errors.items():
                yield Fault(caller, "network", f"cannot connect to {callee.name} ({address}): {error}. {way_out}")


def _shared_folder(inspection: Inspection) -> Iterator[Fault]:
    folder, output_dir = inspection.shared_folder, inspection.inquiry.output_dir
    for node in inspection.answers:
        if node.token_error is not None:
            yield Fault(
                node.name,
                "shared",
                f"cannot write into {folder}, which contains the output folder {output_dir}: {node.token_error}. All "
                "nodes must share it: mount it there, and check its permissions.",
            )
    readers = [node for node in inspection.answers if node.tokens_missing is not None and node.token_error is None]
    if not readers:
        return

    missing = {node.name: set(node.tokens_missing or ()) for node in readers}

    def peers(node: Answers) -> list[Answers]:
        return [other for other in readers if not {other.name, node.name} & (missing[node.name] | missing[other.name])]

    together = peers(max(readers, key=lambda node: len(peers(node))))  # on a tie, max returns the first
    for node in readers:
        if node not in together:
            yield Fault(
                node.name,
                "shared",
                f"and {join_names([other.name for other in together])} do not see what the other wrote into {folder}: "
                f"the output folder {output_dir} is another one there. All nodes must share it: mount the same file "
                "system at the same path, or name another training.output_dir.",
            )


def _files(inspection: Inspection) -> Iterator[Fault]:
    nodes = {node.name: node.files for node in inspection.answers if node.files is not None}
    nowhere: list[str] = []
    missing: dict[str, list[str]] = {name: [] for name in nodes}
    differing: dict[str, list[str]] = {name: [] for name in nodes}
    for pattern, is_needed in inspection.inquiry.files.items():
        present = {name: files[pattern] for name, files in nodes.items() if files[pattern][0]}
        if not present:
            nowhere += [pattern] if nodes and is_needed else []
            continue
        usual, _ = majority(present)
        for name in nodes:
            if name not in present:
                missing[name].append(pattern)
            elif present[name] != usual:
                differing[name].append(pattern)
    folder = inspection.inquiry.folder
    if nowhere:
        text = f"no node has files that match {_quote(nowhere)} (from {folder}). Correct the config or mount the data."
        yield Fault("", "files", text)
    for name in nodes:
        if missing[name]:
            text = f"no file matches {_quote(missing[name])} (from {folder}), unlike other nodes. Mount or copy them."
            yield Fault(name, "files", text)
        if differing[name]:
            yield Fault(
                name,
                "files",
                f"the files of {_quote(differing[name])} differ in names or sizes from those of most nodes. All ranks "
                "must read the same: share them, or copy them again.",
            )


def _quote(patterns: Sequence[str]) -> str:
    return join_names([f"'{pattern}'" for pattern in patterns])

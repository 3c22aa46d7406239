"""Implements `beit3 check-cluster`, which finds faults on the nodes of a hostfile before a run starts."""

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import integer, real
from beit3_ds.config.numbers import Range

if TYPE_CHECKING:
    from beit3_ds.cluster.check.fault import Fault
    from beit3_ds.cluster.check.inspection import Inspection

_EXAMPLES = """examples:
  beit3 check-cluster hostfiles/localhost
  beit3 check-cluster my_hosts ds_configs/giant_zero3_64gpu.json
  beit3 check-cluster my_hosts --bandwidth --expect-gbit 200

Run this command in the folder from which the run will be started. It asks all nodes at once over ssh, by a script that
runs there with the Python at the same path. Nodes need only ssh and Python for the check, and no file stays there. The
exit status is 0 without faults, 1 with faults, and 2 if the hostfile or the config cannot be read.
"""


def add_check_cluster_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `check-cluster`."""
    summary = "find in seconds what would go wrong on the nodes of a hostfile, before a run starts"
    command = add_command(subparsers, "check-cluster", _check_cluster, summary, epilog=_EXAMPLES)
    command.add_argument("hostfile", help="one machine per line: NAME slots=RANKS")
    command.add_argument(
        "config",
        nargs="?",
        help="the run's JSON file: also check that its layout fits the slots, that its memory fits the GPUs, that its "
        "checkpoints fit the disk, and that its output folder is shared",
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the config (repeatable)"
    )
    command.add_argument(
        "--master-port",
        type=integer(Range(1, 65535)),
        default=29500,
        metavar="N",
        help="port on which rank 0 will listen (default: 29500)",
    )
    command.add_argument(
        "--bandwidth",
        action="store_true",
        help="also measure every link between the nodes, about one second per node",
    )
    command.add_argument(
        "--expect-gbit",
        type=real(Range(0, 1e6)),
        metavar="G",
        help="with --bandwidth: expected speed of a link in Gbit/s; a link below half of this speed is a fault "
        "(default: the usual speed of the links, at least 1)",
    )


def _check_cluster(options: argparse.Namespace) -> int:
    from beit3_ds.cluster import read_hostfile
    from beit3_ds.cluster.check.inspection import Inquiry, inspect_cluster
    from beit3_ds.cluster.check.link_faults import find_link_faults
    from beit3_ds.cluster.check.node_faults import find_node_faults
    from beit3_ds.cluster.check.report import describe_faults, describe_nodes
    from beit3_ds.cluster.check.requirements import compute_requirements, find_required_files
    from beit3_ds.config import ConfigError, load_run_config

    hostfile = read_hostfile(options.hostfile)
    if options.set and options.config is None:
        raise ConfigError("--set changes a config, but none was named. Name it behind the hostfile.")
    config = load_run_config(options.config, options.set) if options.config is not None else None
    inquiry = Inquiry(
        folder=Path.cwd(),
        output_dir=Path(config.training.output_dir).absolute() if config is not None else None,
        files=find_required_files(config) if config is not None else {},
        master_port=options.master_port,
        environment=_forwarded(os.environ),
    )
    inspection = inspect_cluster(hostfile, inquiry)
    requirements = None
    if config is not None:  # after the inspection, because importing torch would delay its clock readings
        requirements = compute_requirements(config, hostfile)
    faults = [*find_node_faults(inspection, requirements), *find_link_faults(inspection)]
    if requirements is not None:
        faults += requirements.faults()
    print(describe_nodes(inspection, faults))
    if requirements is not None:
        print(requirements.describe())
    if options.bandwidth:
        faults += _check_bandwidth(inspection, faults, options.expect_gbit)
    print(describe_faults(hostfile, faults))
    return 1 if any(not fault.is_note for fault in faults) else 0


def _check_bandwidth(inspection: "Inspection", faults: "list[Fault]", expect_gbit: float | None) -> "list[Fault]":
    from beit3_ds.cluster.check.links import describe_links, find_slow_links, measure_links

    if len(inspection.answers) == 1:
        print("links: there are none, the hostfile names one machine")
        return []
    if hindering := {fault.check for fault in faults if not fault.is_note} & {"answer", "torch", "network", "port"}:
        print(f"links: not measured; first fix what prevents it ({', '.join(sorted(hindering))})")
        return []
    print(f"measuring the links between {len(inspection.answers)} nodes ...", file=sys.stderr)
    expected_bits = None if expect_gbit is None else expect_gbit * 1e9
    links = measure_links(inspection, expected_bits)
    if isinstance(links, list):
        return links
    print(describe_links(links))
    return list(find_slow_links(links, expected_bits))


def _forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the ranks' environment variables whose names start with PYTHON, GLOO_ or NCCL_.

    The variables come from `environment` and from the files `.deepspeed_env`. They select the code and the network
    interfaces of the ranks.
    """
    values = dict(environment)
    for folder in (Path.home(), Path.cwd()):
        with contextlib.suppress(OSError):
            lines = (folder / ".deepspeed_env").read_text(encoding="utf-8", errors="replace").splitlines()
            values |= {key: value for key, is_set, value in (line.partition("=") for line in lines) if is_set}
    return {key: value for key, value in values.items() if key.startswith(("PYTHON", "GLOO_", "NCCL_"))}

"""Counts the CPU cores that this process may use, and divides them among the ranks of a host."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_OF_PROCESS = Path("/proc/self/cgroup")


def count_cores() -> int:
    """Returns the number of CPU cores that this process may use.

    This is the number of cores in the process's affinity, or the container's CPU quota if that is lower.
    """
    return min(len(os.sched_getaffinity(0)), cpu_quota() or math.inf)  # type: ignore[return-value]


def describe_cores() -> dict[str, Any]:
    """Returns the ids of the CPU cores that this rank may use, and its CPU quota, as a JSON-serializable dict."""
    return {"affinity": sorted(os.sched_getaffinity(0)), "quota": cpu_quota()}


def divide_cores(ranks: Sequence[tuple[str, Mapping[str, Any]]]) -> list[int]:
    """Returns the number of threads for each rank, so that ranks on one host do not compete for cores.

    A core that several ranks may use is shared equally among them. A CPU quota is divided equally among the ranks of
    the host. Each rank gets at least one thread.

    Args:
        ranks: host name and result of `describe_cores` for each rank.
    """
    users = Counter((host, core) for host, own in ranks for core in own["affinity"])
    ranks_on_host = Counter(host for host, _ in ranks)
    threads = []
    for host, own in ranks:
        shares = sum(1 / users[host, core] for core in own["affinity"])
        quota = math.inf if own["quota"] is None else own["quota"] / ranks_on_host[host]
        threads.append(max(1, int(min(shares, quota) + 1e-6)))
    return threads


def cpu_quota(root: Path = _CGROUP_ROOT, membership: Path = _CGROUP_OF_PROCESS) -> int | None:
    """Returns the number of cores that this process's control groups permit, rounded up, or None without a limit.

    Args:
        root: mount point of the control groups.
        membership: file that lists the control groups of this process.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / controllers if controllers else root
        # The limits of all parent groups count too. In a container the process sees its own group as the root.
        for group in (folder / own.lstrip("/"), *(folder / own.lstrip("/")).parents):
            if not group.is_relative_to(folder):
                break
            quotas.extend(_read_quota(group))
    return max(1, math.ceil(min(quotas))) if quotas else None


def _read_quota(group: Path) -> list[float]:
    """Returns a list with the quota of one control group (version 1 or 2) in cores; empty without a quota."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    except (OSError, ValueError):
        return []

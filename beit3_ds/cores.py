"""How many CPU cores this process may use, and how the ranks of a host divide them."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_OF_PROCESS = Path("/proc/self/cgroup")


def count_cores() -> int:
    """Returns the cores that this process may use: its affinity, or its container's CPU quota where that is less."""
    return min(len(os.sched_getaffinity(0)), cpu_quota() or math.inf)  # type: ignore[return-value]


def describe_cores() -> dict[str, Any]:
    """Returns what other ranks need to know of this rank's cores: their numbers and the CPU quota, as JSON values."""
    return {"affinity": sorted(os.sched_getaffinity(0)), "quota": cpu_quota()}


def divide_cores(ranks: Sequence[tuple[str, Mapping[str, Any]]]) -> list[int]:
    """Returns the threads of every rank, so that the ranks of a host do not wait for each other's.

    A core that several ranks may use counts for each as a share of it; a rank that its launcher has bound to cores of
    its own keeps them all.

    Args:
        ranks: host and `describe_cores` of each.
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
    """Returns the cores that the control groups of this process grant, rounded up; None without a limit.

    Args:
        root: where the control groups are mounted.
        membership: the file that names the groups of this process.
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
        # A limit of any group above counts too. In a container the process sees its own group as the root.
        for group in (folder / own.lstrip("/"), *(folder / own.lstrip("/")).parents):
            if not group.is_relative_to(folder):
                break
            quotas.extend(_read_quota(group))
    return max(1, math.ceil(min(quotas))) if quotas else None


def _read_quota(group: Path) -> list[float]:
    """The quota of one control group in cores: of version 2 (cpu.max) or version 1; empty without one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    except (OSError, ValueError):
        return []

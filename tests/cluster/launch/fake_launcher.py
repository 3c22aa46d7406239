"""Stands in for DeepSpeed's launcher: starts a guard for every rank on this machine, as if on hosts of these names.

Called with a hostfile and the guards' arguments. Ends when all guards have, with status 1 if one has failed. On a host
`absent` no guard comes up, and for ever something waits for it, as a ssh does.
"""

import os
import subprocess
import sys

from beit3_ds.cluster.hostfile import read_hostfile

GUARD = [sys.executable, "-m", "beit3_ds.cluster.launch.rank_guard"]


def main() -> int:
    hostfile, arguments = read_hostfile(sys.argv[1]), sys.argv[2:]
    guards = []
    for rank in range(hostfile.world_size):
        is_absent = hostfile.host_of(rank).name == "absent"
        command = ["sleep", "1000"] if is_absent else [*GUARD, *arguments]
        guards.append(subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}))
    return int(max(guard.wait() for guard in guards) != 0)


if __name__ == "__main__":
    sys.exit(main())

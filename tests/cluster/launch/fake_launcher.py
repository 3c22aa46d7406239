"""Fakes DeepSpeed's launcher: starts the guards of all ranks on this machine instead of the hosts in the hostfile.

Arguments are a hostfile, the arguments of the guards, and a path by which tests find the process. The launcher ends
when all guards have ended, with status 1 if a guard failed. For a rank on the host `absent`, it starts a process that
waits forever, as ssh would.
"""

import os
import subprocess
import sys

from beit3_ds.cluster.hostfile import read_hostfile

GUARD = [sys.executable, "-m", "beit3_ds.cluster.launch.rank_guard"]


def main() -> int:
    hostfile, arguments = read_hostfile(sys.argv[1]), sys.argv[2:-1]
    guards = []
    for rank in range(hostfile.world_size):
        is_absent = hostfile.host_of(rank).name == "absent"
        command = ["sleep", "1000"] if is_absent else [*GUARD, *arguments]
        guards.append(
            subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "RUN": os.path.realpath(sys.argv[1])})
        )
    return int(max(guard.wait() for guard in guards) != 0)


if __name__ == "__main__":
    sys.exit(main())

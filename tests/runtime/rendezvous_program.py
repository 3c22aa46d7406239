"""Runs a rank that meets the others like a rank of a training, sums values with them, and prints its interface.

Imports half as much as a run. The argument is the number of seconds to wait for other ranks.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from beit3_ds.config import ConfigError
from beit3_ds.runtime.launch_environment import read_launch
from beit3_ds.runtime.rendezvous import Rendezvous
from beit3_ds.runtime.run_secret import read_secret


def main() -> int:
    """Returns the exit status: 0, or 2 after a line with the error."""
    launch = read_launch(os.environ)
    os.environ.update(launch.variables())
    seconds = float(sys.argv[1])
    try:
        with Rendezvous(launch, seconds, read_secret(launch.secret_file, None)) as rendezvous:
            rendezvous.meet()
            try:
                dist.init_process_group(
                    "gloo",
                    store=rendezvous.store,
                    rank=launch.rank,
                    world_size=launch.world_size,
                    timeout=timedelta(seconds=seconds),
                )
                dist.all_reduce(total := torch.tensor([10.0**launch.rank]))
            except RuntimeError as error:
                raise rendezvous.explain(error) from error
    except ConfigError as error:
        print(f"rank {launch.rank}: {error}", flush=True)
        return 2
    print(f"rank {launch.rank}: sum {total.item():.0f} over {os.environ['GLOO_SOCKET_IFNAME']}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

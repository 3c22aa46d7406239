"""Reads hostfiles, checks the machines that they name, and launches runs on them.

Nothing here imports torch or DeepSpeed at import time, so commands answer at once, even where neither works.
"""

from beit3_ds.cluster.hostfile import Hostfile, HostSlots, parse_hostfile, read_hostfile, write_hostfile

__all__ = ["HostSlots", "Hostfile", "parse_hostfile", "read_hostfile", "write_hostfile"]

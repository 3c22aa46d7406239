"""Reads hostfiles, checks the machines listed in them, and launches training runs on these machines.

Importing this package loads neither torch nor DeepSpeed. So commands start fast, and also work if torch or DeepSpeed is
broken.
"""

from beit3_ds.cluster.hostfile import Hostfile, HostSlots, parse_hostfile, read_hostfile, write_hostfile

__all__ = ["HostSlots", "Hostfile", "parse_hostfile", "read_hostfile", "write_hostfile"]

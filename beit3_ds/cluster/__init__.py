"""Reads hostfiles, checks the machines that they name, and launches runs on them.

Importing this package loads neither torch nor DeepSpeed, so commands start fast, even if these libraries are broken.
"""

from beit3_ds.cluster.hostfile import Hostfile, HostSlots, parse_hostfile, read_hostfile, write_hostfile

__all__ = ["HostSlots", "Hostfile", "parse_hostfile", "read_hostfile", "write_hostfile"]

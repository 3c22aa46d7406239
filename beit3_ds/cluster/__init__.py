"""The machines of a run: the file that names them, and what each of them must have before a run starts.

Nothing here imports torch or DeepSpeed: these commands answer at once, also on a machine where neither works.
"""

from beit3_ds.cluster.hostfile import Hostfile, HostSlots, parse_hostfile, read_hostfile, write_hostfile

__all__ = ["HostSlots", "Hostfile", "parse_hostfile", "read_hostfile", "write_hostfile"]

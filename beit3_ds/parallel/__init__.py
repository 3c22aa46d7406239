"""Process groups and collectives; knows nothing of BEiT-3."""

from beit3_ds.parallel.mesh import Mesh, build_mesh

__all__ = ["Mesh", "build_mesh"]

"""Corrects the paths in a Triton cache that was moved to another folder.

    python -m beit3_ds.benchmarks.moved_cache FOLDER

Triton stores absolute paths of a kernel's files in the cache. If a path does not exist, Triton compiles the kernel
again.
"""

import json
import sys
from pathlib import Path


def relocate(cache: Path) -> int:
    """Replaces the absolute paths in a Triton cache by paths in the cache's current folder.

    Returns:
        Number of kernels in the cache.
    """
    groups = list(cache.resolve().glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        paths = {name: str(group.with_name(name)) for name in names}
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    return len(groups)


if __name__ == "__main__":
    print(f"{relocate(Path(sys.argv[1]))} kernels in {sys.argv[1]}")

"""What a rank runs: versions and code, to be compared with the other ranks'."""

import hashlib
import sys

from beit3_ds.cluster.check.probe import Probe


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that ranks must share, and a digest of the project's code.

    Of Python the first two numbers count, on which bytecode and wheels depend. Nothing is imported; the code is read.
    """
    found = Probe().software()
    versions = {name: str(version) for name, version in found["versions"].items()}
    code = hashlib.sha256(repr(sorted((found["code"] or {}).items())).encode()).hexdigest()[:12]
    return {"python": f"{sys.version_info.major}.{sys.version_info.minor}", **versions, "code": code}

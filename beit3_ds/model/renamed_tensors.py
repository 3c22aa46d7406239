"""Maps tensor names in files of older versions to their current names.

The readers of checkpoints and of exported weights apply this mapping, so all other code uses only current names.
"""

from collections.abc import Iterable

RENAMED_TENSORS: dict[str, str] = {"heads.norm.": "norm."}
"""Maps each old prefix of tensor names to the current prefix.

The final dot prevents a prefix from matching part of a longer name. Entries are never removed, because users keep old
files.
"""


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Maps the current names of a file's tensors to their names in the file, in the order of the file.

    Args:
        names: names of all tensors in the file; a name may be old or current.
    """
    return {_current_name(name): name for name in names}


def _current_name(name: str) -> str:
    for old, current in RENAMED_TENSORS.items():
        if name.startswith(old):
            return current + name.removeprefix(old)
    return name

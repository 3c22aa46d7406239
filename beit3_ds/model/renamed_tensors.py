"""Maps logical names of tensors in files of older versions to their current names.

The readers of checkpoints and of exported weights apply this map, so all other code sees only current names.
"""

from collections.abc import Iterable

RENAMED_TENSORS: dict[str, str] = {"heads.norm.": "norm."}
"""Maps each old prefix of logical names to the current prefix.

The final dot keeps a prefix from matching a part of a longer name. Entries are never removed, because users keep old
files."""


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Maps the current name of every tensor in a file to the name stored in the file; keeps the file's order.

    Args:
        names: names of all tensors in the file, old or current.
    """
    return {_current_name(name): name for name in names}


def _current_name(name: str) -> str:
    for old, current in RENAMED_TENSORS.items():
        if name.startswith(old):
            return current + name.removeprefix(old)
    return name

"""Maps old logical names of tensors, in files of older versions of this program, to current names.

Readers of checkpoints and of exported weights use it, so the rest of the program knows only current names.
"""

from collections.abc import Iterable

RENAMED_TENSORS: dict[str, str] = {"heads.norm.": "norm."}
"""Current prefix of logical names by old prefix.

The final dot keeps a prefix from matching a part of a longer name. Entries are never removed, because files stay."""


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the stored name of every tensor of a file by its current name, in the order of the file.

    Args:
        names: names of all tensors of a file, old or current.
    """
    return {_current_name(name): name for name in names}


def _current_name(name: str) -> str:
    for old, current in RENAMED_TENSORS.items():
        if name.startswith(old):
            return current + name.removeprefix(old)
    return name

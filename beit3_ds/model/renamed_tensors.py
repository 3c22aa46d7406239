"""Logical names of tensors in files that older versions of this program wrote.

Readers of checkpoints and of exported weights look here, so that the rest of the program knows current names only.
"""

from collections.abc import Iterable

RENAMED_TENSORS: dict[str, str] = {"heads.norm.": "norm."}
"""Current beginnings of logical names by the old ones. The final dot keeps a beginning from
matching a part of a longer name. Entries are never removed, because files stay."""


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the name in the file of every tensor, by its current name and in the file's order.

    Args:
        names: names of all tensors of a file, old or current.
    """
    return {_current_name(name): name for name in names}


def _current_name(name: str) -> str:
    for old, current in RENAMED_TENSORS.items():
        if name.startswith(old):
            return current + name.removeprefix(old)
    return name

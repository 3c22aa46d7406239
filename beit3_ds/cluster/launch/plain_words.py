"""Checks that words of the hosts' command lines contain no special characters, because shells read these lines.

DeepSpeed's launcher puts double quotes around words with blanks, but leaves other words unquoted. Shells expand `$( )`
in both cases. Values that may contain special characters, such as the training command, are therefore sent to the hosts
in a message (`messages.Start`).
"""

import re

from beit3_ds.config import ConfigError

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_@+=:,./-]")  # without %, which pdsh replaces, and ~, which shells expand


def is_plain_word(word: str) -> bool:
    """Returns whether shells and pdsh leave all characters of a word unchanged; False for an empty word."""
    return word != "" and _NOT_PLAIN.search(word) is None


def check_plain_word(word: str, what: str, way_out: str) -> None:
    """Checks that a word is not empty and contains no character that a shell might change.

    Args:
        word: word of a command line.
        what: description of the word for the error message, such as "the path of this Python".
        way_out: sentence for the error message that tells how to fix the error.

    Raises:
        ConfigError: if the word is empty, or contains a special character, which the message shows.
    """
    if not word:
        raise ConfigError(f"launcher: {what} is empty, but the hosts' command lines need a value. {way_out}")
    if found := _NOT_PLAIN.search(word):
        raise ConfigError(
            f"launcher: {what} is {word!r}. It is part of a command line on the hosts, and shells would change the "
            f"character {found[0]!r}. {way_out}"
        )

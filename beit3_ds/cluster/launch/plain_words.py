"""Checks the words of command lines that launchers pass to shells on the hosts: no shell may change them.

DeepSpeed's launcher puts its Python, its variables and the guards' arguments on such lines. It quotes only words with
blanks, in quotes that still expand `$( )`. A line therefore holds only words of these characters; guards receive
everything else through their connection to the supervisor (`messages.Start`).
"""

import re

from beit3_ds.config import ConfigError

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_@+=:,./-]")  # without %, which pdsh replaces, and ~, which shells expand


def is_plain_word(word: str) -> bool:
    """Returns whether shells and pdsh leave a word unchanged."""
    return word != "" and _NOT_PLAIN.search(word) is None


def check_plain_word(word: str, what: str, way_out: str) -> None:
    """Checks that a word contains no character that a shell might change.

    Args:
        word: the word.
        what: name of the word, for the message.
        way_out: sentence with a way out.

    Raises:
        ConfigError: if it contains one; the message shows the first.
    """
    if not word:
        raise ConfigError(f"launcher: {what} is empty, but the launcher writes it on a line for the hosts. {way_out}")
    if found := _NOT_PLAIN.search(word):
        raise ConfigError(
            f"launcher: {what} is {word!r}; the launcher writes it on a line that shells on the hosts read, and they "
            f"would not leave the character {found[0]!r} as it is. {way_out}"
        )

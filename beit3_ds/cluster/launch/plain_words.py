"""Checks that the words of a command line have no special characters, because shells on the hosts read the line.

DeepSpeed's launcher quotes only words with blanks, and its quotes still expand `$( )`. Other values reach the guards
through the supervisor (`messages.Start`).
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
        word: word of a command line.
        what: description of the word for the message, such as "the path of this Python".
        way_out: sentence for the message that tells users how to fix the fault.

    Raises:
        ConfigError: if the word is empty or contains such a character; the message shows the character.
    """
    if not word:
        raise ConfigError(f"launcher: {what} is empty, but the launcher writes it on a line for the hosts. {way_out}")
    if found := _NOT_PLAIN.search(word):
        raise ConfigError(
            f"launcher: {what} is {word!r}; the launcher writes it on a line that shells on the hosts read, and they "
            f"would not leave the character {found[0]!r} as it is. {way_out}"
        )

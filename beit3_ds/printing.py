"""Makes texts from files, file names and other machines printable."""


def printable(text: str, limit: int | None = None) -> str:
    """Returns a path or a message as one line, with escapes for all characters that do not print.

    Escapes control characters, with which a file's name could move the cursor; invisible characters, which could
    reverse the direction of a line; and bytes that are not UTF-8.

    Args:
        text: the text.
        limit: maximum number of characters to keep. A longer text loses its middle. None keeps all characters.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

"""Escapes unprintable characters in file names, and in texts from files and from other machines."""


def printable(text: str, limit: int | None = None) -> str:
    """Returns a path or message as one line, with all unprintable characters escaped.

    Escapes control characters, which could move the cursor; invisible characters, which could reverse the direction of
    a line; and bytes that are not UTF-8.

    Args:
        text: text to escape.
        limit: maximum number of characters to keep. Longer texts are abbreviated in the middle. None keeps all
            characters.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

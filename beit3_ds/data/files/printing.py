"""Makes names of files printable."""

import re

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


def printable(path: str) -> str:
    """Returns a path or a message as one line, with escapes for control characters and bytes that are not UTF-8."""
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)

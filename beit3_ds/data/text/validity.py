"""Detects binary data that can be decoded as text by accident."""

import re

_NO_TEXT = re.compile(
    "[\x01-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]"
)  # controls except white space, and noncharacters
_TEXT_PER_CONTROL = 10


def check_is_text(text: str) -> None:
    """Checks that a string is text: no NUL, no half surrogate pair, and at most one control character in ten.

    Some control characters are accepted, because web pages contain them and SentencePiece's normalisation removes them.

    Raises:
        ValueError: if the string is not text; the message gives the reason.
    """
    if "\0" in text:
        raise ValueError("NUL: binary data or UTF-16?")
    if _NO_TEXT.search(text) and (count := len(_NO_TEXT.findall(text))) * _TEXT_PER_CONTROL > len(text):
        raise ValueError(f"{count} of {len(text)} characters are control characters: binary data?")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid in JSON but not as text
        raise ValueError(f"half a surrogate pair at character {error.start}") from error

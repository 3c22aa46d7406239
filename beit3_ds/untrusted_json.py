"""Parses JSON from other programs; rejects repeated keys, integers beyond 64 bits, oversized texts and, by default,
NaN.
"""

import json
from typing import Any, NoReturn

MAX_JSON_BYTES = 1 << 23
"""Default maximum size of a JSON text, in bytes."""

# Limits lists and objects, which take most memory and time: `[],` has 3 bytes as text and 72 in memory. Our own files,
# such as a checkpoint's index, have 15 or more bytes of text per list or object.
_MANY_CONTAINERS, _BYTES_PER_CONTAINER = 50_000, 12
_LARGEST_INT = 2**63 - 1
_MOST_DIGITS = 20


def parse_untrusted_json(text: bytes | str, limit: int = MAX_JSON_BYTES, *, accepts_constants: bool = False) -> Any:
    """Parses an untrusted JSON text.

    Args:
        text: JSON text, as a string or in UTF-8.
        limit: maximum length in bytes or, for a string, in characters.
        accepts_constants: whether to accept NaN and infinities.

    Raises:
        ValueError: if the text is too long, has too many lists or objects for its size, is not JSON or is nested too
            deep. Also for a repeated key, an integer beyond 64 bits, or a number beyond the largest float. Also for NaN
            and infinities, unless `accepts_constants`. The message gives the reason.
    """
    check_json_size(text, limit)
    try:
        return json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=float if accepts_constants else _refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None


def check_json_size(text: bytes | str, limit: int) -> None:
    """Checks the size of a JSON text and its number of lists and objects, to limit the memory for parsing.

    Raises:
        ValueError: if the text is longer than `limit`, or has too many lists or objects for its size.
    """
    if len(text) > limit:
        raise ValueError(f"{len(text)} bytes of JSON exceed the limit of {limit}")
    lists, objects = (
        (text.count("["), text.count("{")) if isinstance(text, str) else (text.count(b"["), text.count(b"{"))
    )
    if lists + objects > _MANY_CONTAINERS + len(text) // _BYTES_PER_CONTAINER:
        raise ValueError("it has too many lists or objects for its size")


def check_count(value: Any) -> int:
    """Checks that a value is an integer of at least 0, and returns it.

    Raises:
        ValueError: for any other value, including true and 1.0.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no integer from 0 on")
    return value


def check_text(value: Any) -> str:
    """Checks that a value is a string, and returns it.

    Raises:
        ValueError: for a value of another type.
    """
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no string")
    return value


def check_object(value: Any) -> dict[str, Any]:
    """Checks that a value is a JSON object (a dict), and returns it.

    Raises:
        ValueError: for a value of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} is no object")
    return value


def check_list(value: Any, length: int | None = None) -> list[Any]:
    """Checks that a value is a list of `length` values, or of any length if `length` is None, and returns it.

    Raises:
        ValueError: for a value of another type, or a list of another length.
    """
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{str(value)[:40]!r} is no list{'' if length is None else f' of {length} values'}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} appears twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _parse_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(int(digits)) > _LARGEST_INT:
        raise ValueError("an integer is beyond 64 bits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is beyond the largest float")
    return value

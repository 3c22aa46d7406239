"""Generates hostile values and texts from a seed, and puts them into valid JSON and files."""

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\n\u202etxt\u2028\udc80"
VALUES: list[Any] = [
    *(None, True, False, -1, 0.5, 1e308, float("nan"), 2**63, 10**30, "", "3", "x" * 10_000, ESCAPES),
    *([], {}, [[]], {"a": {}}, [1, 2, 3], [-1], [0.5], [True], [2**62, 2**62], "../../etc/passwd", "/dev/zero"),
    *(json.loads("[" * 300 + "]" * 300), {"__metadata__": 1}, [None] * 5, ["0", "1"], "a\0b", "\ud800", "NaN"),
]
RAW_VALUES = [
    *("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000, "1" * 5000, "-" + "9" * 5000, "1e999", "NaN"),
    *("-Infinity", '{"a":1,"a":2}', '"\\ud800"', '"\\u0000"', "[" + "[]," * 200_000 + "[]]", "tru", '"\x1b[2J"'),
    *("1" * 400, '"' + "x" * 2_000_000 + '"', "1.5e-400", "[" + "0," * 500_000 + "0]"),
]
"""Texts that replace a value in JSON; most of them are not valid JSON."""
TEXTS = [
    *(b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000, b'{"a":' * 50_000),
    *(b"1" * 5000, b'"\\ud800"', b'{"a":"' + b"\x1b" * 10 + b'"}', b"\0" * 100, b"[" + b"[]," * 1_000_000 + b"[]]"),
    *(b"\n" * 2_000_000, b"\xef\xbb\xbf", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"\xc3\x28", b"[{},"),
    *(b"x" * 20_000_000, b"{}\n" * 100_000, b"\x1b[2J\x1b]0;t\x07\n" * 100, b"\r" * 1_000_000),
]
_HOLE_BYTES = 1 << 40  # takes no room


def change_json(content: Any, draw: random.Random) -> None:
    """Replaces, removes or adds one value somewhere in nested objects and lists."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            if isinstance(item, dict | list) and len(places) < 2000:
                visit(item)

    visit(content)
    if not places:
        return
    shallow = places[: min(len(places), 20)]
    holder, key = draw.choice(draw.choice([places, shallow]))
    match draw.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(["", ESCAPES, "x" * 5000, "../x"])] = copy.deepcopy(draw.choice(VALUES))
        case _:
            holder[key] = copy.deepcopy(draw.choice(VALUES))


def changed_json_text(content: Any, draw: random.Random) -> bytes:
    """Changes a JSON value in one or two places; returns the text, which may be invalid JSON."""
    content = json.loads(json.dumps(content))
    for _ in range(draw.choice([1, 1, 2])):
        change_json(content, draw)
    text = json.dumps(content)
    if draw.random() < 0.3:
        numbers = [position for position, c in enumerate(text) if c in ":[," and position + 1 < len(text)]
        if numbers:
            position = draw.choice(numbers) + 1
            text = f"{text[:position]}{draw.choice(RAW_VALUES)}{draw.choice([text[position:], ',' + text[position:]])}"
    data = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.05:
        data = draw.choice([b"\xef\xbb\xbf" + data, text.encode("utf-16", "surrogatepass"), data + b"\xff", data * 2])
    return data


def change_header(path: Path, draw: random.Random) -> None:
    """Changes the JSON header of a safetensors file, or replaces it by another text."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if draw.random() < 0.3:
        text = draw.choice(TEXTS)
        length = draw.choice([len(text), 2**63, 2**40, 0, len(data)])
        path.write_bytes(struct.pack("<Q", length) + text + data[8 + length :])
        return
    header = json.loads(data[8 : 8 + length])
    change_json(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_note(path: Path, key: str, draw: random.Random) -> None:
    """Changes JSON that a safetensors file holds as text in its metadata."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = changed_json_text(json.loads(header["__metadata__"][key]), draw).decode("utf-8", "replace")
    header["__metadata__"][key] = text
    header_bytes = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header_bytes)) + header_bytes + data[8 + length :])


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Returns a copy of the bytes with a part changed, cut off, repeated or replaced."""
    changed = bytearray(data)
    match draw.randrange(4):
        case 0:
            for _ in range(draw.randrange(1, 20)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
        case 1:
            del changed[draw.randrange(len(changed)) :]
        case 2:
            position = draw.randrange(len(changed))
            changed[position:position] = draw.choice(
                [draw.randbytes(draw.randrange(1, 100)), b"\xff" * 16, b"\0" * 512, changed]
            )
        case _:
            position = draw.randrange(max(1, len(changed) - 8))
            number = draw.choice([2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, 0])
            changed[position : position + 8] = number.to_bytes(8, draw.choice(["little", "big"]))
    return bytes(changed)


def replace_file(path: Path, draw: random.Random) -> None:
    """Replaces a file by a pipe, a link, a folder, a file of 1 TiB, a part of itself, or another text."""
    data = path.read_bytes()
    path.unlink()
    match draw.randrange(8):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(draw.choice(["/dev/zero", "/dev/stdin", path.name, "/etc", "/nowhere"]))
        case 2:
            path.mkdir()
        case 3:
            with path.open("wb") as file:
                file.truncate(_HOLE_BYTES)
        case 4:
            path.write_bytes(data[: draw.randrange(len(data))])
        case _:
            path.write_bytes(draw.choice(TEXTS))


def spoil_file(path: Path, draw: random.Random, chance: float) -> None:
    """Replaces a file with the given chance (`replace_file`); otherwise may extend it to 1 TiB by a hole."""
    if draw.random() < chance:
        replace_file(path, draw)
    elif draw.random() < 0.05:
        os.truncate(path, _HOLE_BYTES)

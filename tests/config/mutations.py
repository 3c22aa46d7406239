"""Makes random mistakes in the configuration file of a run."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from beit3_ds.config.deepspeed_keys import DEEPSPEED_KEYS, accepted_keys

WRONG = [None, True, False, "auto", "", "x", "1", [], {}, [1], {"a": 1}, float("nan"), float("inf"), -float("inf")]
NUMBERS = [0, 1, 2, 3, -1, 0.5, -0.5, 1e-12, 1e308, 1.0, 7, 64, 2**31, 2**63, 2**64, 10**30, -(10**30), 5e8]

Path = tuple[str | int, ...]


def nodes(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yields the path of every value in a JSON document, beginning with the whole document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, key))


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate(mapping: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """Returns a copy with one to three random mistakes, and a description of the mistakes."""
    mutant, said = copy.deepcopy(mapping), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice((_replace, _replace, _scale, _scale, _misspell, _remove, _add_key, _add_key, _move))
        said.append(kind(mutant, rng))
    return mutant, "; ".join(said)


def duplicate_key(text: str, rng: random.Random) -> str:
    """Returns the JSON text after repeating one of its keys."""
    lines = text.splitlines()
    number = rng.choice([i for i, line in enumerate(lines) if line.rstrip().endswith(",") and '": ' in line])
    return "\n".join([*lines[: number + 1], *lines[number:]])


def _pick(mapping: Any, rng: random.Random, *, leaf: bool = False) -> Path:
    paths = [path for path in nodes(mapping) if path and not (leaf and isinstance(at(mapping, path), dict | list))]
    return rng.choice(paths) if paths else ()


def _replace(mapping: Any, rng: random.Random) -> str:
    if not (path := _pick(mapping, rng)):
        return "nothing"
    at(mapping, path[:-1])[path[-1]] = value = copy.deepcopy(rng.choice(WRONG + NUMBERS))
    return f"{path} = {value!r}"


def _scale(mapping: Any, rng: random.Random) -> str:
    """Replaces a number by another number of the same type, which is often valid."""
    numbers = [p for p in nodes(mapping) if p and type(at(mapping, p)) in (int, float)]
    if not numbers:
        return "nothing"
    path = rng.choice(numbers)
    old = at(mapping, path)
    new = rng.choice((old + 1, old - 1, old * 2, old * 10, -old, old / 2, 0, old * 1000))
    at(mapping, path[:-1])[path[-1]] = int(new) if isinstance(old, int) and rng.random() < 0.8 else new
    return f"{path}: {old} -> {at(mapping, path)!r}"


def _misspell(mapping: Any, rng: random.Random) -> str:
    path = _pick(mapping, rng)
    if not path or not isinstance(path[-1], str):
        return "nothing"
    key, i = path[-1], rng.randrange(len(path[-1]))
    wrong = rng.choice((key[:i] + key[i + 1 :], key[:i] + "x" + key[i:], key[:i] + key[i:][:2][::-1] + key[i + 2 :]))
    section = at(mapping, path[:-1])
    section[wrong] = section.pop(key)
    return f"{path} -> {wrong!r}"


def _remove(mapping: Any, rng: random.Random) -> str:
    if path := _pick(mapping, rng):
        del at(mapping, path[:-1])[path[-1]]
    return f"without {path}"


def _add_key(mapping: Any, rng: random.Random) -> str:
    """Adds a key of DeepSpeed, often with a value from the table of keys."""
    if rng.random() < 0.3:
        key = rng.choice(sorted(DEEPSPEED_KEYS))
        mapping[key] = value = copy.deepcopy(rng.choice(WRONG + NUMBERS))
        return f"{key} = {value!r}"
    accepted = rng.choice(list(accepted_keys()))
    section = mapping
    for name in accepted.path[:-1]:
        if not isinstance(section.setdefault(name, {}), dict):
            return "nothing"
        section = section[name]
    value = rng.choice(accepted.spec.samples or ("name",)) if rng.random() < 0.7 else rng.choice(WRONG + NUMBERS)
    section[accepted.path[-1]] = copy.deepcopy(value)
    return f"{accepted.name} = {value!r}"


def _move(mapping: Any, rng: random.Random) -> str:
    path, other = _pick(mapping, rng, leaf=True), _pick(mapping, rng)
    if not path or not other or not isinstance(section := at(mapping, other), dict) or not isinstance(path[-1], str):
        return "nothing"
    section[path[-1]] = at(mapping, path)
    return f"{path} also in {other}"


def to_text(mapping: dict[str, Any]) -> str:
    """Returns JSON text; NaN and infinity are spelled as Python spells them."""
    return json.dumps(mapping, indent=1)

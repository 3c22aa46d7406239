"""Strict loading of frozen dataclasses from JSON: every unknown key, wrong type and missing value is an error."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A user's configuration or input cannot work; the message names the values, the rule and a way out."""


def check_known_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuses the first key of `mapping` that is not in `known`, naming the nearest valid ones.

    Raises:
        ConfigError: for an unknown key; `where` says in which section it stands.
    """
    known = list(known)
    for key in mapping:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        hint = f"Did you mean '{near[0]}'?" if near else f"Valid keys: {', '.join(sorted(known))}."
        raise ConfigError(f"{where}: unknown key '{key}'. {hint}")


def load_section(cls: type[T], mapping: Any, where: str) -> T:
    """Builds the dataclass `cls` from a JSON object, recursing into nested dataclasses.

    A nested dataclass with a class variable SHORTHAND may also stand as a string, the value of the field so named.

    Raises:
        ConfigError: for an unknown key, a missing required key or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, got {_show(mapping)}.")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_known_keys(mapping, fields, where)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key '{name}' is missing; it has no default.")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks one JSON value against a field's type; lists become tuples and integers may stand for floats."""
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        shorthand = getattr(hint, "SHORTHAND", None)
        if shorthand and isinstance(value, str):
            value = {shorthand: value}
        return load_section(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(arg for arg in get_args(hint) if arg is not type(None)), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, get_args(hint)))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {_show(value)}.")
        item_hints = get_args(hint)
        if item_hints[-1] is Ellipsis:
            item_hints = (item_hints[0],) * len(value)
        if len(value) != len(item_hints):
            raise ConfigError(f"{where}: expected {len(item_hints)} values, got {len(value)}.")
        pairs = enumerate(zip(item_hints, value, strict=True))
        return tuple(_convert(item_hint, item, f"{where}[{i}]") for i, (item_hint, item) in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {_show(value)}.")
    return value


def _show(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


def check_range(where: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuses a number outside [low, high].

    Raises:
        ConfigError: naming the key, the value and the interval.
    """
    if not low <= value <= high:
        interval = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ConfigError(f"{where} is {value:g}; it must be {interval}.")

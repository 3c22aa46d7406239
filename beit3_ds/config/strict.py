"""Builds frozen dataclasses from JSON, and rejects unknown keys, wrong types and missing values."""

import dataclasses
import difflib
import json
import os
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from beit3_ds.config.numbers import LARGEST_INT, Range, show_number
from beit3_ds.config.renamed_keys import MOVED_KEYS, RENAMED_KEYS, TOKENIZER_KEYS
from beit3_ds.printing import printable

T = TypeVar("T")

_LONGEST_LINE = 4000
_MAX_SHOWN = 80
"""Maximum number of characters of a value that an error message quotes."""


class ConfigError(ValueError):
    """Tells the user that a configuration or an input is invalid.

    The first argument is the message. Further arguments are printed as indented lines below the message. Unprintable
    characters are escaped.
    """

    def __str__(self) -> str:
        return "\n  ".join(printable(str(line), _LONGEST_LINE) for line in self.args)


class FilePath:
    """Marks a string field as a non-empty path or pattern, in which a leading `~` is the home folder."""


PathString = Annotated[str, FilePath()]
"""Path or glob pattern. Environment variables are not expanded."""


def check_known_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Checks that `mapping` has no key outside `known`.

    Args:
        mapping: JSON object to check.
        known: valid keys.
        where: dotted name of the object, for messages.

    Raises:
        ConfigError: if a key is unknown or has been renamed; the message suggests the most similar valid key.
    """
    known = list(known)
    for key in mapping:
        if key not in known:
            if RENAMED_KEYS.get(key) in known:
                raise ConfigError(f"{where}: the key {key!r} is called {RENAMED_KEYS[key]!r} now. Rename it.")
            if key in TOKENIZER_KEYS and where.endswith("tokenizers.visual"):
                raise ConfigError(
                    f"{where}: the key {key!r} belongs to the tokenizer's training, which is a run of its own with the "
                    f'task "visual_tokenizer". Remove it here and set {TOKENIZER_KEYS[key]} in that run\'s file, e.g. '
                    "ds_configs/quickstart_visual_tokenizer_cpu.json."
                )
            if key in MOVED_KEYS:
                raise ConfigError(f"{where}: the key {key!r} is in another section now. Move it to task.{key}.")
            near = nearest(key, known)
            hint = f"Did you mean '{near}'?" if near else f"Valid keys: {', '.join(sorted(known))}."
            raise ConfigError(f"{where}: unknown key {key[:_MAX_SHOWN]!r}. {hint}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the name in `known` that is most similar to `name`, ignoring case, or None if none is similar."""
    names = {known_name.casefold(): known_name for known_name in known}
    near = difflib.get_close_matches(name.casefold(), list(names), n=1, cutoff=0.6)
    return names[near[0]] if near else None


def load_section(cls: type[T], mapping: Any, where: str) -> T:
    """Builds the dataclass `cls`, and the dataclasses nested in it, from a JSON object.

    Numbers must be in the `Range` of their field's annotation. A nested dataclass may have a class variable SHORTHAND
    with the name of one of its fields. The JSON value of such a dataclass may be a string instead of an object; the
    string is the value of the named field.

    Args:
        cls: dataclass to build.
        mapping: JSON value of the section.
        where: dotted name of the section, for messages.

    Raises:
        ConfigError: if a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, got {show(mapping)}.")
    hints = get_type_hints(cls, include_extras=True)
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
    """Converts a JSON value to the type of a field: lists become tuples, and integers may become floats."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *marks = get_args(hint)
        value = _convert(base, value, where)
        for mark in marks:
            value = _check_mark(mark, value, where)
        return value
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
            raise ConfigError(f"{where}: {show(value)} is not one of {', '.join(map(repr, get_args(hint)))}.")
        return value
    if origin is tuple:
        return _convert_list(get_args(hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {show(value)}.{_remedy(hint, value)}")
    return value


def _convert_list(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        remedy = f" Write it in brackets: {json.dumps([value])}." if isinstance(value, str) else ""
        raise ConfigError(f"{where}: expected a list, got {show(value)}.{remedy}")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(value) != len(hints):
        raise ConfigError(f"{where}: expected {len(hints)} values, got {len(value)}.")
    return tuple(_convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _check_mark(mark: Any, value: Any, where: str) -> Any:
    if isinstance(mark, Range) and value not in mark:
        raise ConfigError(f"{where} is {show_number(value)}; it must be {mark}.")
    if isinstance(mark, FilePath):
        return expand_home(value, where)
    return value


def _remedy(hint: Any, value: Any) -> str:
    """Returns advice on how to correct a value of the wrong type; empty if the user's intention is unclear."""
    if hint is int and isinstance(value, float) and value.is_integer():
        return f" Write {int(value)}."
    if hint is str and isinstance(value, int | float):
        return " Write it in quotes."
    return ""


def expand_home(path: str, where: str) -> str:
    """Replaces a leading `~` or `~name` in a path with the home folder.

    Args:
        path: path or glob pattern.
        where: dotted name of the value, for messages.

    Raises:
        ConfigError: if the path is empty or the user is unknown.
    """
    if not path:
        raise ConfigError(f"{where} is empty. Name a path, e.g. '.' for the working directory.")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{where}: {path!r} names the home folder of an unknown user. Write './{path}' for a file.")
    return expanded


def parse_json(text: str, where: str) -> Any:
    """Parses JSON, and rejects objects that repeat a key. Accepts NaN and infinities, which `check_plain` rejects.

    Args:
        text: text to parse.
        where: name of the text, for messages.

    Raises:
        ConfigError: if the text is not valid; the message names the mistake and its position.
    """
    try:
        return _parse(text, where)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}.") from None


def parse_json_or_text(text: str, where: str) -> Any:
    """Parses `text` as JSON, and returns `text` unchanged if it is not JSON.

    Raises:
        ConfigError: if an object repeats a key, if an integer is too large, or if nesting is too deep.
    """
    try:
        return _parse(text, where)
    except json.JSONDecodeError:
        return text


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError:
        raise
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: objects or lists are nested too deep.") from None
    except ValueError:
        raise ConfigError(f"{where}: an integer has more digits than any computer integer.") from None


def check_plain(value: Any, where: str) -> None:
    """Checks that a JSON value contains no NaN, infinity, integer beyond 64 bits or unprintable string, at any depth.

    Args:
        value: parsed JSON value.
        where: dotted name of the value, for messages.

    Raises:
        ConfigError: if the value contains any of these; the message names the key.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_string(key, f"{where}: the key {show(key)}")
            check_plain(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif isinstance(value, str):
        _check_string(value, where)
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise ConfigError(f"{where} is {value}; a finite number is needed.")
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ConfigError(f"{where} is {show_number(value)}, which no computer integer holds.")


def is_plain_text(value: str) -> bool:
    """Returns whether a string can be a path or a name: it contains no control characters and no surrogates."""
    return not any(character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in value)


def _check_string(value: str, where: str) -> None:
    if not is_plain_text(value):
        raise ConfigError(f"{where}: {show(value)} holds characters that no path or name can have. Remove them.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"the key {twice[:_MAX_SHOWN]!r} appears twice in one object.")
    return mapping


def show(value: Any) -> str:
    """Returns the type and the abbreviated representation of a value, for messages."""
    text = show_number(value) if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    text = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return f"{type(value).__name__} {text}"

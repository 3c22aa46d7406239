"""Defines the list of object categories; the order gives the labels, which are the class indices of the head."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from beit3_ds.config import ConfigError


class Category(NamedTuple):
    """Holds the id and the name of a category of objects."""

    identifier: int
    """Id of the category in annotation files. Ids may have gaps: COCO's 80 categories have ids up to 90."""
    name: str
    """Name of the category."""


class Categories:
    """Holds the categories of a run, sorted by id; the label of a category is its index in this order."""

    def __init__(self, categories: Iterable[Category], where: str) -> None:
        """Sorts the categories by id.

        Args:
            categories: the categories, in any order.
            where: name of the file or weights with these categories, for messages.

        Raises:
            ConfigError: if there are no categories, or two categories have equal ids.
        """
        self.where = where
        self._sorted = tuple(sorted(categories))
        if not self._sorted:
            raise ConfigError(f"detection: {where} lists no categories. Name another file.")
        for first, second in zip(self._sorted, self._sorted[1:], strict=False):
            if first.identifier == second.identifier:
                raise ConfigError(
                    f"detection: {where} lists category {first.identifier} twice, as {first.name!r} and "
                    f"{second.name!r}. Remove one of them."
                )

    def __len__(self) -> int:
        """Returns the number of categories."""
        return len(self._sorted)

    def __iter__(self) -> Iterator[Category]:
        """Yields the categories in the order of their labels."""
        return iter(self._sorted)

    def __eq__(self, other: object) -> bool:
        """Returns whether `other` has equal ids and names."""
        return isinstance(other, Categories) and self._sorted == other._sorted

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def labels(self) -> Mapping[int, int]:
        """Maps category ids to labels."""
        return {category.identifier: label for label, category in enumerate(self._sorted)}

    @property
    def names(self) -> list[str]:
        """Returns the category names in the order of the labels."""
        return [category.name for category in self._sorted]

    def describe(self) -> list[tuple[int, str]]:
        """Returns the ids and names of the categories, for storing in checkpoints."""
        return [tuple(category) for category in self._sorted]  # type: ignore[misc]

    def as_json(self) -> list[dict[str, Any]]:
        """Returns the categories as the member 'categories' of a COCO annotation file."""
        return [{"id": category.identifier, "name": category.name} for category in self._sorted]


def is_identifier(value: object) -> bool:
    """Returns whether a JSON value is an id of a category, image or annotation: an integer of at most 64 bits."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def read_categories(entries: Iterable[Any], where: str) -> Categories:
    """Converts the member 'categories' of an annotation file to `Categories`.

    Args:
        entries: entries of the member 'categories'.
        where: name of the file, for messages.

    Raises:
        ConfigError: if there are no categories, or two categories have equal ids.
        KeyError: if an entry lacks 'id' or 'name'.
        ValueError: if an 'id' is not an integer of at most 64 bits, or a 'name' is not a string.
    """
    found = []
    for entry in entries:
        identifier, name = entry["id"], entry["name"]
        if not is_identifier(identifier) or not isinstance(name, str):
            raise ValueError(f"a category has no number 'id' or no text 'name': {str(entry)[:80]}")
        found.append(Category(identifier, name))
    return Categories(found, where)


def stored_categories(described: Mapping[str, Any] | None, where: str) -> Categories | None:
    """Returns the categories that are stored with weights; None if there are none.

    Args:
        described: result of `Detection.describe` in the run that trained the weights; None if unknown.
        where: name of the weights, for messages.
    """
    entries: Sequence[Any] = (described or {}).get("categories") or ()
    return (
        Categories((Category(int(identifier), str(name)) for identifier, name in entries), where) if entries else None
    )


def check_same(own: Categories, other: Categories) -> None:
    """Checks that two lists of categories are equal.

    Raises:
        ConfigError: if they differ; the message names the first difference.
    """
    if own == other:
        return
    raise ConfigError(
        f"detection: the categories of {other.where} are not those of {own.where}: {_first_difference(own, other)}. "
        "Outputs of the head would mean other categories. Use files with the same categories, or start from weights "
        "without these layers (`beit3 export WEIGHTS OUT.safetensors --leave-out 'heads.boxes.stages.*.classes.*' "
        "--leave-out 'heads.masks.masks.*'`)."
    )


def _first_difference(own: Categories, other: Categories) -> str:
    theirs = {category.identifier: category.name for category in other}
    for category in own:
        if category.identifier not in theirs:
            return f"{category.identifier} ({category.name!r}) is missing there"
        if theirs[category.identifier] != category.name:
            return f"{category.identifier} is {theirs[category.identifier]!r} there and {category.name!r} here"
    known = own.labels
    extra = next(category for category in other if category.identifier not in known)
    return f"{extra.identifier} ({extra.name!r}) is unknown here"

"""Finds the images and questions of a `beit3 predict` command, before the model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_ds.config import ConfigError
from beit3_ds.data.files.json_lines import iterate_json_lines
from beit3_ds.data.files.kinds import IMAGE_EXTENSIONS
from beit3_ds.data.files.names import iterate_names


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image."""

    image: Path
    """Path of the image file."""
    question: str
    """Text of the question."""
    identifier: int | str | None = None
    """Identifier of the question in the results, if there is one."""


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Lists image files in the given order; replaces each folder by the images directly inside it, sorted by name.

    Raises:
        ConfigError: if a path does not exist, or a folder contains no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                file for file in path.iterdir() if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
            )
            if not inside:
                raise ConfigError(f"the folder {path} holds no images (.{', .'.join(IMAGE_EXTENSIONS)}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"there is no image {path}. Correct the path.")
    return found


def read_questions(path: str | Path, folder: str | Path | None = None) -> list[Question]:
    """Reads questions from JSON lines with `question`, `image` and optionally `id`.

    Args:
        path: path of the file.
        folder: folder of the images; None takes the folder of the file.

    Raises:
        ConfigError: if the file cannot be read, if a question is missing or empty, if an image does not exist, or if an
            id occurs twice. The message names the file and the line.
    """
    base, questions, lines = Path(folder or Path(path).parent), [], dict[int | str, int]()
    for line, found in iterate_json_lines(str(path), {"question": str, "image": str}):
        where, identifier = f"{path}:{line}", found.get("id")
        if not found["question"].strip():
            raise ConfigError(f"{where} has an empty question. Write one, or take the line out.")
        if not (base / found["image"]).is_file():
            raise ConfigError(f"{where}: there is no image {base / found['image']}. Correct the path or the folder.")
        if identifier is not None and not (isinstance(identifier, int | str) and not isinstance(identifier, bool)):
            raise ConfigError(f"{where}: the id {identifier!r} is neither a number nor a text.")
        if identifier is not None and lines.setdefault(identifier, line) != line:
            raise ConfigError(f"{where}: the id {identifier!r} occurs in line {lines[identifier]} already.")
        questions.append(Question(image=base / found["image"], question=found["question"], identifier=identifier))
    if not questions:
        raise ConfigError(f"{path} holds no questions. Write one JSON object per line, with 'question' and 'image'.")
    return questions


def read_names(path: str | Path) -> list[str]:
    """Reads names from a text file with one name per line; skips blank lines.

    Raises:
        ConfigError: if the file cannot be read or contains no names.
    """
    try:
        names = [line.strip() for line in iterate_names(str(path)) if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Name a text file with one name per line.") from None
    if not names:
        raise ConfigError(f"{path} holds no names. Write one per line.")
    return names

"""Reads the secret that the ranks of a run share, or creates the secret in the output folder."""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from beit3_ds.config import ConfigError

SECRET_VARIABLE = "BEIT3_SECRET_FILE"
"""Environment variable with the secret file's path. `beit3 launch` creates a new file each time it starts the ranks."""
SECRET_FILE = "rank_secret"
"""Name of the secret file in the output folder. The file is used if `SECRET_VARIABLE` is not set."""
_LEAST_BYTES, _MOST_BYTES = 16, 4096


def read_secret(named: str | None, output_dir: str | None) -> bytes:
    """Returns the ranks' secret, with which ranks prove to each other that they belong to the same run.

    The secret is the content of a file. If `named` is None, this is a file in the output folder. If that file does not
    exist yet, this function creates it with mode 0600.

    Args:
        named: path of the secret file, as set in `SECRET_VARIABLE`; None means the file in the output folder.
        output_dir: output folder, on storage that all hosts share.

    Raises:
        ConfigError: if both arguments are None, or if the file cannot be read or created, is too short, is accessible
            to other users, or belongs neither to the current user nor to root.
    """
    if named is None and output_dir is None:
        raise ConfigError(
            "the ranks have no common secret by which they recognise each other. Name a file with mode 0600 and at "
            f"least {_LEAST_BYTES} random bytes on all hosts: {SECRET_VARIABLE}=FILE."
        )
    path = Path(named) if named is not None else Path(output_dir or "") / SECRET_FILE
    try:
        if named is None:
            _create(path)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status, secret = os.fstat(file.fileno()), file.read(_MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"the ranks' secret {path} cannot be read: {error.strerror}. {_way_out(path)}") from None
    if not stat.S_ISREG(status.st_mode) or len(secret) < _LEAST_BYTES:
        raise ConfigError(f"the ranks' secret {path} has fewer than {_LEAST_BYTES} bytes. {_way_out(path)}")
    if status.st_mode & 0o077 or status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"the ranks' secret {path} belongs to user {status.st_uid} and has mode {status.st_mode & 0o777:04o}, so "
            f"other users may know it. It must belong to you and have mode 0600. {_way_out(path)}"
        )
    return secret


def _create(path: Path) -> None:
    """Writes a new secret to `path` unless the file exists. If several ranks write at once, the first file remains."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_hex(32).encode())
        file.flush()
        os.fsync(file.fileno())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # never replaces a file, and shows it with its whole content
    finally:
        temporary.unlink()


def _way_out(path: Path) -> str:
    return f"Delete or correct {path}, or name another file on all hosts with {SECRET_VARIABLE}=FILE."

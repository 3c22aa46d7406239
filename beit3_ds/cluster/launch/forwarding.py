"""Chooses the environment variables that `beit3 launch` forwards from this machine to the ranks."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from beit3_ds.cluster.launch.forwarded_names import FORWARDED_NAMES
from beit3_ds.config import ConfigError
from beit3_ds.printing import printable

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def forwarded_environment(environment: Mapping[str, str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """Returns the variables to forward: `FORWARDED_NAMES`, the variables in DeepSpeed's `.deepspeed_env`, and `wanted`.

    Error messages never contain the value of a variable.

    Args:
        environment: environment of this process.
        wanted: additional variables from the option `--env`, each as NAME or NAME=VALUE. The value of a plain NAME is
            taken from `environment`.

    Raises:
        ConfigError: if a name in `wanted` is invalid, if a plain NAME is not in `environment`, or if a line of
            `.deepspeed_env` is not NAME=VALUE.
    """
    chosen = {name: value for name, value in environment.items() if name in FORWARDED_NAMES}
    chosen |= _variables_of_deepspeed(environment)
    for item in wanted:
        name, is_set, value = item.partition("=")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--env: {name!r} is not a valid name of a variable. Write NAME or NAME=VALUE.")
        if not is_set and name not in environment:
            raise ConfigError(f"--env {name}: {name} is not set here. Set it, or write {name}=VALUE.")
        chosen[name] = value if is_set else environment[name]
    return chosen


def describe_forwarded(forwarded: Mapping[str, str]) -> list[str]:
    """Returns one line per forwarded variable. Only lines of variables in `FORWARDED_NAMES` contain the value.

    Other values may be secrets.
    """
    return [
        f"{name}={printable(value)}" if name in FORWARDED_NAMES else f"{name} (value not shown)"
        for name, value in sorted(forwarded.items())
    ]


def _variables_of_deepspeed(environment: Mapping[str, str]) -> dict[str, str]:
    """Reads the variables in the files `.deepspeed_env` of the home folder and the working directory.

    If both files set a variable, the value from the working directory is used. DS_ENV_FILE in `environment` replaces
    the file name `.deepspeed_env`.

    Raises:
        ConfigError: if a line is not NAME=VALUE; the message contains the line number.
    """
    found: dict[str, str] = {}
    for folder in (Path.home(), Path()):
        path = folder / environment.get("DS_ENV_FILE", ".deepspeed_env")
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="surrogateescape").splitlines(), start=1):
            name, is_set, value = line.partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not is_set or not _NAME.fullmatch(name.strip()):
                raise ConfigError(
                    f"{path.absolute()}, line {number} is not NAME=VALUE. Correct the line, or delete the file and use "
                    "--env."
                )
            found[name.strip()] = value.strip()
    return found

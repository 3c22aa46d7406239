"""Chooses the variables that the ranks get from the machine on which `beit3 launch` runs."""

import re
from collections.abc import Mapping, Sequence

from beit3_ds.config import ConfigError

_PREFIXES = (
    *("NCCL_", "GLOO_", "UCX_", "FI_", "OFI_", "RDMAV_", "MV2_"),  # networks
    *("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_"),
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "GOMP_", "MALLOC_"),
    *("PYTHON", "DS_", "DEEPSPEED_", "BEIT3_", "HF_", "MLFLOW_"),
)
_NAMES = frozenset({"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "TZ", "LANG", "LC_ALL"})
_OF_THE_HOST = frozenset({"CUDA_VISIBLE_DEVICES", "DEEPSPEED_TIMEOUT", "DS_ENV_FILE"})
"""Variables that the launcher sets on each host, or that are for the launcher itself."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def forwarded_environment(environment: Mapping[str, str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """Returns the variables that the ranks get.

    By default these configure networks, torch, DeepSpeed and threads, and the paths of programs and libraries.

    Args:
        environment: environment of this process.
        wanted: further names, or NAME=VALUE (the options `--env`).

    Raises:
        ConfigError: for an invalid name, or one without a value that is not set here.
    """
    chosen = {
        name: value
        for name, value in environment.items()
        if (name in _NAMES or name.startswith(_PREFIXES)) and name not in _OF_THE_HOST
    }
    for item in wanted:
        name, is_set, value = item.partition("=")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--env {item}: {name!r} is not a valid name of a variable. Write NAME or NAME=VALUE.")
        if not is_set and name not in environment:
            raise ConfigError(f"--env {item}: {name} is not set here. Set it, or write {name}=VALUE.")
        chosen[name] = value if is_set else environment[name]
    return chosen

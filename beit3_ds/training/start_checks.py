"""Checks software, device and output folder before data is read, for training and for `beit3 check`."""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch

from beit3_ds.config import ConfigError, RunConfig, TrainingConfig
from beit3_ds.kernels.ops import cuda_kernels
from beit3_ds.model.parameter_groups import check_frozen
from beit3_ds.tasks import Task
from beit3_ds.training.optimizer import check_optimizer

_MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_software(config: RunConfig) -> None:
    """Checks that the packages and kernels that a run needs are installed.

    Raises:
        ConfigError: if something is not installed; the message names what to install.
    """
    check_optimizer(config.training)
    _check_kernels_are_built(config.training)
    for monitor, package in _MONITOR_PACKAGES.items():
        if config.deepspeed.get(monitor, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{monitor}.enabled needs the package {package}, which is not installed. Run: pip install {package}, "
                f"or leave {monitor} out."
            )


def check_device(config: TrainingConfig) -> None:
    """Checks that this machine has the device that `training.kernel_backend` needs.

    Raises:
        ConfigError: if the device is missing; the message names the setting to leave out.
    """
    if config.kernel_backend == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'training.kernel_backend="cuda" needs a CUDA device, and this machine has none that torch can use. '
            "Leave the setting out."
        )


def check_frozen_patterns(task: Task) -> None:
    """Checks that the patterns of `training.frozen` match some, but not all, of the model's parameter names.

    Raises:
        ConfigError: if a pattern matches no parameter, or the patterns match all parameters.
    """
    if patterns := task.config.training.frozen:
        with torch.device("meta"):
            check_frozen(patterns, [name for name, _ in task.build_model().named_parameters()])


def check_output_dir(folder: Path) -> None:
    """Checks that an output folder can be created and written to. Creates nothing.

    Raises:
        ConfigError: if the folder cannot be created or written to; the message names the folder or file that prevents
            this.
    """
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise _unwritable(folder, f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{nearest} is not writable")


def prepare_output_dir(folder: Path) -> None:
    """Creates the output folder, and tests writing to it.

    Raises:
        ConfigError: if the folder cannot be created or written to.
    """
    check_output_dir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise _unwritable(folder, str(error)) from None


def _unwritable(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"training.output_dir={folder} cannot be written: {reason}. Fix the folder, free space, or choose another one."
    )


def _check_kernels_are_built(config: TrainingConfig) -> None:
    if config.kernel_backend == "cuda" and not cuda_kernels.is_built():
        raise ConfigError(
            'training.kernel_backend="cuda" needs the kernels in CUDA C++, which are not built. Build them with nvcc: '
            'BEIT3_BUILD_CUDA=1 pip install --no-build-isolation . (docs/kernels_cuda.md), or set "auto".'
        )

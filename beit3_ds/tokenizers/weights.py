"""Files of other projects' weights, read without running any of their code."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from beit3_ds.config import ConfigError


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a file of tensors into a model: by name, or by order where all names differ and all shapes agree.

    Ports of one network often differ in nothing but the names of its layers.

    Args:
        model: the network, for example timm's `tf_efficientnet_lite0`.
        path: a .safetensors file, or one of torch that holds tensors alone (read with `weights_only`), at its top or
            under "state_dict" or "model".

    Raises:
        ConfigError: if the file cannot be read or neither names nor shapes fit.
    """
    state = read_tensors(path)
    wanted = model.state_dict()
    if state.keys() != wanted.keys():
        shapes = [value.shape for value in state.values()]
        if state.keys() & wanted.keys() or shapes != [value.shape for value in wanted.values()]:
            missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
            raise ConfigError(
                f"{path} does not fit {type(model).__name__}: of {len(wanted)} tensors {len(missing)} are missing "
                f"({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])}), and the shapes in "
                f"order differ. Use the weights of this very network."
            )
        state = dict(zip(wanted, state.values(), strict=True))
    model.load_state_dict(state)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file or of one of torch, without running any code of the file.

    Raises:
        ConfigError: if the file cannot be read or holds no tensors by name.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data; training scripts save their options
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read as a file of tensors: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} holds no tensors by name. Save the network's state_dict().")
    return dict(state)

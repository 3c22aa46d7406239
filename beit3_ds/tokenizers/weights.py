"""Loads other projects' weights into a network of the same shape."""

from pathlib import Path

from torch import nn

from beit3_ds.config import ConfigError
from beit3_ds.untrusted_file import read_tensors


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a file of tensors into a model by name, or in order if all names differ and all shapes agree.

    Ports of one network often differ only in the names of its layers.

    Args:
        model: the network, for example timm's `tf_efficientnet_lite0`.
        path: a file that `read_tensors` reads.

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
                f"order differ. Use weights of this network."
            )
        state = dict(zip(wanted, state.values(), strict=True))
    model.load_state_dict(state)

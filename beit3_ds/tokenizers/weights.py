"""Loads weights from other projects into a network; the tensors must have the shapes of the network's parameters."""

from pathlib import Path

from torch import nn

from beit3_ds.config import ConfigError
from beit3_ds.untrusted_file import read_tensors


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads tensors from a file into a model, matched by name or by order.

    Tensors are matched by order if the file and the model have no tensor name in common, but list equal shapes in the
    same order. This is the case for some ports of a network to another library.

    Args:
        model: the network, for example timm's `tf_efficientnet_lite0`.
        path: path of a file in a format that `read_tensors` reads.

    Raises:
        ConfigError: if the file cannot be read, or the tensors match neither by name nor by order.
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

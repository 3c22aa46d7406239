"""Determines weight decay, learning-rate factor and freezing of each parameter from its logical name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

from beit3_ds.config import ConfigError, RunConfig

T = TypeVar("T")

_NO_DECAY = re.compile(
    r"(^|[._])(bias|cls_token|mask_token|image_position|text_position|relative_position|pos_embed|norm\d?|layernorm"
    r"|level_embed|queries_embedder|queries_features|gamma)([._]|$)"
)
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_HEAD = "heads."


class ParameterGroup(NamedTuple):
    """Holds the settings of an optimizer group. Parameters with equal settings form one group."""

    weight_decay: float
    """Decoupled weight decay."""
    lr_scale: float
    """Factor on the learning rate of the schedule; 0 for frozen parameters."""

    @property
    def is_frozen(self) -> bool:
        """Returns whether the group's parameters are frozen."""
        return self.lr_scale == 0


def decays(name: str) -> bool:
    """Returns whether weight decay applies to a parameter, given its logical name.

    Weight decay does not apply to biases, norms, learned factors, position embeddings, level embeddings, CLS tokens,
    mask tokens and segmentation queries. The rule uses names instead of shapes, because ZeRO-3 changes the shapes of
    partitioned parameters.
    """
    return not _NO_DECAY.search(name)


def layer_number(name: str, num_layers: int) -> int:
    """Returns the layer number of a parameter for layer-wise learning-rate decay.

    As in BEiT-3's released code, the embeddings are layer 0, and block i is layer i + 1. The final norm and the head
    are layer `num_layers` + 1.

    Args:
        name: logical name, such as `blocks.3.ffn.fc2.weight_vision`.
        num_layers: number of blocks of the model.
    """
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    return 0 if name.startswith("embeddings.") else num_layers + 1


def parameter_group(name: str, config: RunConfig) -> ParameterGroup:
    """Returns the optimizer settings of a parameter, given its logical name.

    The learning rate of layer l is multiplied by `layer_decay` ** (`num_layers` + 1 - l), as in ELECTRA (Clark et al.,
    2020, arXiv:2003.10555) and BEiT (arXiv:2106.08254). The learning rate of the head is multiplied by
    `head_learning_rate_scale` too.
    """
    training, num_layers = config.training, 0 if config.backbone is None else config.backbone.num_layers
    if is_frozen(name, training.frozen):
        return ParameterGroup(0.0, 0.0)
    scale = training.layer_decay ** (num_layers + 1 - layer_number(name, num_layers))
    if name.startswith(_HEAD):
        scale *= training.head_learning_rate_scale
    return ParameterGroup(training.weight_decay if decays(name) else 0.0, scale)


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a parameter's logical name matches a pattern of `training.frozen`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def group_parameters(parameters: Mapping[str, T], config: RunConfig) -> dict[ParameterGroup, list[T]]:
    """Groups the parameters that have equal optimizer settings. No group is empty.

    Args:
        parameters: maps the logical name of each parameter to the value that is grouped: the parameter, or any other
            value.
        config: the run's configuration.

    Returns:
        Values of each group, in the order of `parameters`. Groups are sorted by weight decay and then by learning-rate
        factor, in descending order.
    """
    groups: dict[ParameterGroup, list[T]] = {}
    for name, value in parameters.items():
        groups.setdefault(parameter_group(name, config), []).append(value)
    return dict(sorted(groups.items(), reverse=True))


def split_groups(groups: list[tuple[ParameterGroup, list[T]]], num_groups: int) -> list[tuple[ParameterGroup, list[T]]]:
    """Splits the largest groups in half until there are `num_groups` groups. All parameters keep their settings.

    Raises:
        ConfigError: if there are fewer than `num_groups` parameters.
    """
    groups = list(groups)
    while len(groups) < num_groups:
        longest = max(range(len(groups)), key=lambda i: len(groups[i][1]))
        group, values = groups[longest]
        if len(values) == 1:
            raise ConfigError(
                f"training.layer_decay and training.frozen: every stage of the pipeline needs {num_groups} groups of "
                f"parameters, but a stage has only {len(groups)} parameters, of which each can be a group. Lower "
                "parallel.pipeline_parallel_size."
            )
        half = len(values) // 2
        groups[longest : longest + 1] = [(group, values[:half]), (group, values[half:])]
    return groups


def check_frozen(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Checks that each pattern of `training.frozen` matches a parameter, and that not all parameters are frozen.

    Args:
        patterns: patterns of `training.frozen`.
        names: logical names of all parameters.

    Raises:
        ConfigError: if a pattern matches no parameter (the message lists the model's modules), or if all parameters are
            frozen.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            modules = ", ".join(sorted({f"{name.split('.')[0]}.*" for name in names}))
            raise ConfigError(
                f"training.frozen: {pattern!r} matches no parameter. Patterns match whole logical names, such as "
                f"{names[0]!r}; `*` stands for any characters. Modules: {modules}."
            )
    if all(is_frozen(name, patterns) for name in names):
        raise ConfigError(f"training.frozen={list(patterns)} freezes every parameter. Leave out a pattern.")

"""Adapts stored weights to a model whose configuration differs in some settings.

    image_size                   patch positions are interpolated
    patch_size                   the patch projection kernel is resampled, and patch positions are interpolated
    dense                        changed from null to a section: the CLS and mask tokens are dropped
                                 weights without relative positions: the model's tables start at zero
                                 model without relative positions: the stored tables are dropped
                                 other size of the windows or of the image: the tables are interpolated
    max_text_length              shorter: only the first positions are kept
                                 longer: new positions get initial values
    layout                       changed from shared to decoupled: vision and language each get a copy of the
                                 shared weights
    num_vision_language_layers   more: each new expert is a copy of its block's vision expert, because most rows
                                 of a pair are image rows
                                 fewer: the surplus experts are dropped
    final_norm                   false: the norm is dropped, as in the released VQAv2 and ImageNet models
                                 true: the norm gets initial values if the weights have none
    inputs                       fewer: tensors that the remaining inputs do not need are not read
                                 more: the weights must contain the tensors that the added inputs need
    tie_word_embeddings          changed from true to false: the embeddings keep the word table, and the MLM head
                                 gets initial values

All other settings that affect tensors must be equal in the two configurations.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from beit3_ds.config import FIELDS_WITHOUT_TENSORS, INPUT_KINDS, ConfigError, ModelConfig
from beit3_ds.model.dense.relative_positions import covered_extent
from beit3_ds.model.dense.resampling import (
    PATCH_WEIGHT,
    resample_patch_weight,
    resample_positions,
    resample_relative_positions,
)
from beit3_ds.model.initialization import initial_value
from beit3_ds.model.pretrained import (
    EXTRA_PREFIX,
    IMAGE_POSITION,
    REPLACEABLE,
    check_tensors,
    matrix_part,
)

TEXT_POSITION = "embeddings.text_position"
"""Name of the text position table. Only this tensor's shape depends on `max_text_length`."""

_MAPPED_BYTES = 2**26
"""Number of parameter bytes to fill before the memory-mapped pages of the weight files are released."""
_ADAPTABLE = frozenset(
    {"image_size", "patch_size", "dense", "max_text_length", "layout", "num_vision_language_layers", "final_norm"}
    | {"inputs"}
)
_DECOUPLED = re.compile(r"(.*\.attention\..*|norm\..*)_(vision|language)")
_EXPERT = re.compile(r"blocks\.(\d+)\.ffn\..*?_(vision_language|vision|language)")
_RELATIVE_POSITION = re.compile(r"blocks\.(\d+)\.attention\.relative_position\.(rows|columns)")
_TOKENS = frozenset({"embeddings.cls_token", "embeddings.mask_token"})
"""Names of the embedding tensors that do not exist in a model whose `ModelConfig.dense` is set."""
_TABLES = {
    "vision": frozenset(
        f"embeddings.{name}" for name in ("patch.weight", "patch.bias", "cls_token", "mask_token", "image_position")
    ),
    "language": frozenset({"embeddings.word.weight", TEXT_POSITION}),
}
"""Names of the embedding tensors of each modality."""


class StoredWeights(Protocol):
    """Declares the interface for reading weights from disk: exported or imported weights, or a checkpoint."""

    @property
    def path(self) -> Path:
        """Returns the path of the weights, a file or a folder."""

    @property
    def model(self) -> ModelConfig:
        """Returns the configuration of the stored model."""

    def names(self) -> list[str]:
        """Returns the names of all tensors."""

    def shape(self, name: str) -> torch.Size:
        """Returns the logical shape of a tensor, which is its shape without tensor parallelism."""

    def read(self, name: str, part: Any = None) -> Tensor:
        """Returns a tensor, or only the rows and columns that `part` selects (`matrix_part`)."""

    def release_pages(self) -> None:
        """Frees the memory of all file pages that have been read."""


class AdaptedWeights:
    """Adapts stored weights to another model configuration. `read` computes each tensor on demand.

    Attributes:
        path: path of the weights, a file or a folder.
        model: configuration to which the weights are adapted.
        changes: one sentence per adapted setting; empty if the configurations are equal.
    """

    def __init__(self, weights: StoredWeights, model: ModelConfig, where: str, *, seed: int = 0) -> None:
        """Compares the stored configuration with `model`. Reads no tensors.

        Args:
            weights: the stored weights.
            model: configuration to which the weights are adapted.
            where: name of the weights, for messages.
            seed: seed of the initial values of new text positions.

        Raises:
            ConfigError: if the configurations differ in settings that cannot be adapted; the message lists these
                settings.
        """
        self.path, self.model = weights.path, model
        self._weights, self._seed = weights, seed
        _check_adaptable(weights.model, model, where)
        self.changes = list(_describe_changes(weights.model, model))
        self._held = {name for name in weights.names() if not name.startswith(EXTRA_PREFIX)}

    def check(self, wanted: Mapping[str, torch.Size]) -> list[str]:
        """Checks names and shapes of the adapted tensors against the model's parameters.

        Args:
            wanted: shape of each model parameter, by name.

        Returns:
            Names of the head and final-norm parameters that the weights lack.

        Raises:
            ConfigError: if the weights lack a parameter outside the head and the final norm, or if `check_tensors`
                finds an unknown tensor or a wrong shape.
        """
        wanted = {name: shape for name, shape in wanted.items() if not self._starts_at_zero(name)}
        self._check_inputs(wanted)
        given = [name for name in wanted if self._source(name) in self._held]
        used = {self._source(name) for name in given}
        found = {name: self.read(name).shape for name in given}
        unknown = [name for name in self._held - used if not self._is_dropped(name) and not name.startswith("heads.")]
        return check_tensors(str(self.path), found | {name: self._weights.shape(name) for name in unknown}, wanted)

    def read(self, name: str, part: tuple[int, int, int, int] | None = None) -> Tensor:
        """Returns an adapted tensor, or only the rows and columns that `part` selects (`matrix_part`)."""
        relative = _RELATIVE_POSITION.fullmatch(name)
        if name not in (IMAGE_POSITION, PATCH_WEIGHT, TEXT_POSITION) and not relative:
            return self._weights.read(self._source(name), part)
        if self._starts_at_zero(name):
            assert relative is not None
            tensor = torch.zeros(2 * covered_extent(self.model, int(relative[1])) - 1, self.model.head_size)
        else:
            tensor = self._resample(name, self._weights.read(name))
        return tensor if part is None else matrix_part(tensor, part)

    def _resample(self, name: str, tensor: Tensor) -> Tensor:
        """Resizes a tensor whose shape depends on the sizes of images, patches, windows or texts.

        If the new configuration (`model`) has the same sizes as the stored configuration, the tensor is not resized, so
        that `check` can detect a wrong shape. If only the new configuration sets `dense`, the position of the CLS token
        is removed, even if the sizes are equal.
        """
        stored = self._weights.model
        if name == IMAGE_POSITION:
            return resample_positions(tensor, stored, self.model)
        if name == PATCH_WEIGHT:
            is_same = stored.patch_size == self.model.patch_size
            return tensor if is_same else resample_patch_weight(tensor, self.model.patch_size)
        if relative := _RELATIVE_POSITION.fullmatch(name):
            layer = int(relative[1])
            is_same = covered_extent(stored, layer) == covered_extent(self.model, layer)
            return tensor if is_same else resample_relative_positions(tensor, self.model, layer)
        rows, shape = len(tensor), torch.Size((self.model.max_text_length, tensor.shape[1]))
        if self.model.max_text_length == stored.max_text_length:
            return tensor
        further = initial_value(name, shape, self.model, self._seed)[rows:].to(tensor.dtype)
        return torch.cat([tensor[: self.model.max_text_length], further])

    def _starts_at_zero(self, name: str) -> bool:
        """Returns whether the tensor is a table of relative positions and is missing from the stored weights."""
        return bool(_RELATIVE_POSITION.fullmatch(name)) and name not in self._held

    def release_pages(self) -> None:
        """Frees the memory of all file pages that have been read (`PretrainedWeights.release_pages`)."""
        self._weights.release_pages()

    def _source(self, name: str) -> str:
        """Returns the name of the stored tensor from which the model tensor `name` is computed."""
        if self._weights.model.layout != self.model.layout:
            decoupled = _DECOUPLED.fullmatch(name)
            name = f"{decoupled[1]}_shared" if decoupled else name
        match = _EXPERT.fullmatch(name)
        if match and match[2] == "vision_language" and not _has_fused_expert(self._weights.model, int(match[1])):
            return name.removesuffix("_vision_language") + "_vision"
        return name

    def _is_dropped(self, name: str) -> bool:
        """Returns whether the model does not use a stored tensor, for example because the model lacks the tensor's
        expert.
        """
        if name.startswith("norm.") and not self.model.final_norm:
            return True
        if name in _TOKENS or _RELATIVE_POSITION.fullmatch(name):
            return self.model.dense is not None or "vision" not in self.model.modalities
        if match := _EXPERT.fullmatch(name):
            return match[2] not in self.model.experts(int(match[1]))
        if match := _DECOUPLED.fullmatch(name):
            return match[2] not in self.model.modalities
        return any(name in names and modality not in self.model.modalities for modality, names in _TABLES.items())

    def _check_inputs(self, wanted: Iterable[str]) -> None:
        """Checks that the stored weights contain all tensors for this model's kinds of input.

        Does nothing if the stored model takes all kinds of input. Tensors of the head and the final norm may be
        missing.

        Args:
            wanted: names of the tensors that this model needs.

        Raises:
            ConfigError: if tensors are missing; the message gives their number and one example.
        """
        if self._weights.model.inputs == INPUT_KINDS:
            return
        missing = [name for name in wanted if not name.startswith(REPLACEABLE) and self._source(name) not in self._held]
        if missing:
            theirs, ours = (" and ".join(m.inputs) for m in (self._weights.model, self.model))
            raise ConfigError(
                f"{self.path} holds a model for {theirs} alone, without {len(missing)} tensors that this model for "
                f"{ours} needs ({missing[0]}, for example). Use weights of a model with these inputs, or set "
                f"model.inputs to {json.dumps(self._weights.model.inputs)}."
            )


def fill_parameters(model: nn.Module, weights: AdaptedWeights) -> None:
    """Copies adapted weights into a model's parameters, one parameter at a time.

    If the weights lack parameters of the head or the final norm, these parameters get initial values, and a warning
    lists them.

    Raises:
        ConfigError: if the weights lack any other parameter, contain an unknown tensor, or contain a tensor of the
            wrong shape.
    """
    parameters = dict(model.named_parameters())
    absent = weights.check({name: parameter.shape for name, parameter in parameters.items()})
    if absent:
        warnings.warn(
            f"{weights.path} has no {', '.join(absent)}: these keep their initial values. Fine-tuned releases lack "
            f"the masked-modeling heads, and some the final norm.",
            stacklevel=4,
        )
    with torch.no_grad():
        mapped = 0
        for name, parameter in parameters.items():
            is_absent = name in absent
            parameter.copy_(initial_value(name, parameter.shape, weights.model, 0) if is_absent else weights.read(name))
            mapped += parameter.nbytes
            if mapped > _MAPPED_BYTES:
                mapped = 0
                weights.release_pages()


def _check_adaptable(stored: ModelConfig, model: ModelConfig, where: str) -> None:
    theirs, ours = dataclasses.asdict(stored), dataclasses.asdict(model)
    free = FIELDS_WITHOUT_TENSORS | _ADAPTABLE | ({"tie_word_embeddings"} if stored.tie_word_embeddings else set())
    fixed = [name for name in ours if name not in free and theirs[name] != ours[name]]
    if stored.layout != model.layout and model.layout != "decoupled":
        fixed.append("layout")
    if stored.dense is not None and model.dense is None:
        fixed.append("dense")
    if fixed:
        differences = "; ".join(f"{name} {theirs[name]!r} there, {ours[name]!r} here" for name in fixed)
        raise ConfigError(
            f"{where} holds another model: {differences}. Set the model section to that of the weights (`beit3 "
            "inspect` prints it), or name other weights. Only image_size, patch_size, max_text_length, "
            'num_vision_language_layers, inputs, final_norm, layout (to "decoupled"), dense (not to null) and '
            "tie_word_embeddings (to false) may differ."
        )


def _describe_changes(stored: ModelConfig, model: ModelConfig) -> list[str]:
    changes = []
    if stored.patch_size != model.patch_size:
        changes.append(f"kernel of patches of {stored.patch_size} px resampled to {model.patch_size} px")
    if stored.dense is None and model.dense is not None:
        changes.append("CLS and mask token left out")
    new, old = (m.dense is not None and m.dense.relative_positions for m in (model, stored))
    if new and not old:
        changes.append("relative positions start at zero")
    elif old and not new:
        changes.append("relative positions left out, which changes features")
    if stored.grid_size != model.grid_size:
        changes.append(f"positions of {stored.image_size} px interpolated to {model.image_size} px")
    if model.max_text_length < stored.max_text_length:
        changes.append(f"the first {model.max_text_length} of {stored.max_text_length} text positions kept")
    elif model.max_text_length > stored.max_text_length:
        changes.append(
            f"initial values for text positions {stored.max_text_length} to {model.max_text_length - 1}, which the "
            "weights lack"
        )
    if stored.final_norm and not model.final_norm:
        changes.append("final norm left out")
    if stored.layout != model.layout:
        changes.append("shared attention and norms copied for vision and language")
    takes_pairs = "pairs" in model.inputs and "pairs" in stored.inputs
    fused, old_fused = (
        {layer for layer in range(m.num_layers) if takes_pairs and _has_fused_expert(m, layer)} for m in (model, stored)
    )
    if added := sorted(fused - old_fused):
        changes.append(f"vision-language experts of {_blocks(added)} copied from their vision experts")
    if dropped := sorted(old_fused - fused):
        changes.append(
            f"vision-language experts of {_blocks(dropped)} left out, which changes features of pairs, "
            "but not of images or texts alone"
        )
    if absent := [kind for kind in stored.inputs if kind not in model.inputs]:
        changes.append(f"what only {' and '.join(absent)} need left out")
    return changes


def _has_fused_expert(model: ModelConfig, layer: int) -> bool:
    """Returns whether a block is one of the `num_vision_language_layers` top blocks. Ignores `model.inputs`."""
    return layer >= model.num_layers - model.num_vision_language_layers


def _blocks(layers: list[int]) -> str:
    return f"block {layers[0]}" if len(layers) == 1 else f"blocks {layers[0]} to {layers[-1]}"

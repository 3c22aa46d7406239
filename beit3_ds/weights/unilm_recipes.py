"""A model in the reference's layout, which its own code loads (unilm/beit3 on torchscale 0.3.0)."""

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.model.pretrained import EXTRA_PREFIX
from beit3_ds.weights.recipe import Recipe, copy_recipe
from beit3_ds.weights.source import TensorSource
from beit3_ds.weights.unilm_layout import (
    POSITION_TABLES,
    TEXT_POSITION_ROWS,
    TOKENS,
    UNUSED_POSITIONS,
    reference_keys,
)


def unilm_recipes(source: TensorSource, *, fusion: bool) -> list[Recipe]:
    """Every tensor of the reference's state dict; heads that the source lacks are left out.

    The reference has no vision-language expert. A model with one is two files: "dual" (A = vision, B = language) is
    exact for images and for texts, "fusion" (A = B = vision-language in the top blocks) for pairs.

    What an import kept because this project has no place for it comes back under its own key.

    Raises:
        ConfigError: if `fusion` is asked of a model without vision-language experts.
    """
    if fusion and not source.model.num_vision_language_layers:
        raise ConfigError(
            "unilm-fusion: the model has no vision-language expert, so that unilm-dual is exact for images, texts and "
            "pairs alike. Use --format unilm-dual."
        )
    held = set(source.names())
    recipes = []
    for key, name in reference_keys(source.model, fusion=fusion).items():
        if name in held or not name.startswith("heads."):
            recipes.append(_recipe(source, key, name, held))
    own_keys = {recipe.name for recipe in recipes}
    extras = [name for name in held if name.startswith(EXTRA_PREFIX)]
    for name in sorted(extras):
        if (key := name.removeprefix(EXTRA_PREFIX)) not in own_keys:
            recipes.append(copy_recipe(source, name)._replace(name=key))
    return recipes


def _recipe(source: TensorSource, key: str, name: str, held: set[str]) -> Recipe:
    if key in POSITION_TABLES:
        return _position_recipe(source, key, name, held)
    recipe = copy_recipe(source, name)._replace(name=key)
    if key not in TOKENS:
        return recipe
    return recipe._replace(shape=(1, 1, *recipe.shape), make=lambda: source.read(name).view(1, 1, -1))


def _position_recipe(source: TensorSource, key: str, name: str, held: set[str]) -> Recipe:
    """Unused rows, those of this project, and filler up to the table's usual size; an imported table gets no filler."""
    (rows, width), dtype, unused = source.shape(name), source.dtype(name), EXTRA_PREFIX + key
    imported = unused in held
    filler = 0 if imported or name != "embeddings.text_position" else TEXT_POSITION_ROWS - UNUSED_POSITIONS - rows

    def make() -> Tensor:
        first = source.read(unused) if imported else torch.zeros(UNUSED_POSITIONS, width, dtype=dtype)
        return torch.cat([first, source.read(name), torch.zeros(max(filler, 0), width, dtype=dtype)])

    return Recipe(key, dtype, (UNUSED_POSITIONS + rows + max(filler, 0), width), make)

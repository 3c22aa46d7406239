"""Tests which differences between images the hand-made teacher sees, and which it ignores."""

import pytest
import torch
import torch.nn.functional as F

from beit3_ds.config import ConfigError
from beit3_ds.tokenizers import OrientedGradients
from beit3_ds.tokenizers.oriented_gradients import _orientation_votes


@pytest.mark.parametrize(("patch_size", "image_size"), [(8, 64), (14, 224), (16, 96)])
def test_features_have_one_row_per_patch(patch_size: int, image_size: int) -> None:
    teacher = OrientedGradients(patch_size)
    features = teacher(torch.rand(2, 3, image_size, image_size) * 2 - 1)
    assert features.shape == (2, (image_size // patch_size) ** 2, teacher.width)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()


def test_a_grating_votes_for_its_orientation() -> None:
    axis = torch.arange(32.0)
    for bin_ in range(9):
        angle = torch.tensor(bin_ * torch.pi / 9)
        wave = torch.sin(0.3 * (torch.cos(angle) * axis[None, :] + torch.sin(angle) * axis[:, None]))
        votes = _orientation_votes(wave.expand(1, 3, 32, 32))[0, :, 4:-4, 4:-4].sum((1, 2))
        # Catches exchanged axes and bins over the full turn; the difference filter bends other angles a little.
        assert votes.argmax() == bin_, (bin_, votes)


def test_votes_add_up_to_the_magnitude() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1
    votes = _orientation_votes(image)
    assert votes.sum() == pytest.approx(2 * 8 * 0.5)  # two columns of 8 pixels, difference (1 - 0) / 2


def test_gradients_ignore_the_sign_of_contrast() -> None:
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(_orientation_votes(image), _orientation_votes(-image))  # unsigned orientations


def test_patches_are_in_row_major_order() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, 0, 8:16, 16:24] = 1  # red in row 1, column 2 of a 4 x 4 grid
    features = OrientedGradients(8)(image)[0]
    blank = OrientedGradients(8)(torch.zeros(1, 3, 32, 32))[0]
    assert (features - blank).norm(dim=-1).argmax() == 1 * 4 + 2  # catches a transposed grid: it would be 2 * 4 + 1


def test_flat_patches_differ_by_colour_and_surroundings() -> None:
    image = torch.ones(1, 3, 64, 64)
    image[:, :, :8, :8] = -1
    features = F.normalize(OrientedGradients(8)(image)[0], dim=-1)
    assert features[0] @ features[63] < 0.9  # black and white: gradients alone would not tell them apart
    assert features[1] @ features[63] < 0.9  # white beside something, and white far from it


def test_odd_patches_are_refused() -> None:
    with pytest.raises(ConfigError, match="patch_size=7"):
        OrientedGradients(7)

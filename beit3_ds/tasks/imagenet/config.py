"""Defines the keys of the "task" section for classifying images."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Share

MixingStrength = Annotated[float, Range(0, 100)]
"""Both parameters of the beta distribution from which shares of mixed images are drawn; 0 mixes nothing."""

_PLACE = "{name}"


@dataclass(frozen=True, kw_only=True)
class ImagenetConfig:
    """Configures the classification of images by the names of their classes (paper section 3.2)."""

    head: Literal["names", "linear"] = "names"
    """`names` compares the features of an image with those of all class names, as the paper does. `linear` is a linear
    layer over the mean patch, as in the reference's fine-tuned models; it reads no texts."""
    num_classes: Positive = 1000
    """Number of classes in the list, which is checked against it."""
    prompt: str = _PLACE
    """Text of a class, in which `{name}` stands for its name."""
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1
    """Share of the target that is spread evenly over all compared classes (the reference: 0.1)."""
    mixup: MixingStrength = 0.0
    """Strength of mixup, which adds two images (Zhang et al., 2018, arXiv:1710.09412; the reference: 0.8)."""
    cutmix: MixingStrength = 0.0
    """Strength of CutMix, which pastes a rectangle of another image (Yun et al., 2019, arXiv:1905.04899; the reference:
    1.0). With mixup and CutMix, each image has one of both, with probability one half each."""
    mixing_probability: Share = 1.0
    """Probability that an image is mixed with another one of its source."""

    def __post_init__(self) -> None:
        if _PLACE not in self.prompt:
            raise ConfigError(
                f"task.prompt={self.prompt!r} has no {_PLACE}, so all classes would have the same text. Write it where "
                "the name of the class belongs."
            )
        if self.head == "linear" and self.is_mixing:
            raise ConfigError(
                f"task.head='linear' learns from one class per image, but mixup={self.mixup:g} and cutmix="
                f"{self.cutmix:g} mix two. Set both to 0, or use the head 'names'."
            )

    @property
    def is_mixing(self) -> bool:
        """Returns whether training images are mixed."""
        return bool((self.mixup or self.cutmix) and self.mixing_probability)

    def text_of(self, name: str) -> str:
        """Returns the text of a class."""
        return self.prompt.replace(_PLACE, name)

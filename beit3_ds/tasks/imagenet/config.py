"""Defines the keys of the "task" section for image classification."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Share

MixingStrength = Annotated[float, Range(0, 100)]
"""Strength of mixing two images: the first image's share is drawn from Beta(a, a), where a is this value. 0 mixes no
images."""

_PLACE = "{name}"


@dataclass(frozen=True, kw_only=True)
class ImagenetConfig:
    """Configures image classification by class names or by a linear layer (paper section 3.2)."""

    head: Literal["names", "linear"] = "names"
    """Head that classifies images. `names` compares the features of an image with the features of all class names, as
    in the paper. `linear` applies a linear layer to the mean of the patches, as in Microsoft's fine-tuned models, and
    reads no texts."""
    num_classes: Positive = 1000
    """Number of classes; must equal the number of classes in the class file."""
    prompt: str = _PLACE
    """Template for the text of a class; `{name}` is replaced by the class name."""
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1
    """Share of an image's target probability that is spread evenly over all classes. With the head `names`, these are
    the classes whose texts are part of the training step. Microsoft's BEiT-3 code uses 0.1."""
    mixup: MixingStrength = 0.0
    """Strength of mixup, which blends two images (Zhang et al., 2018, arXiv:1710.09412). The first image's share is
    drawn from the distribution Beta(a, a), where a is this value. 0 disables mixup (Microsoft's BEiT-3 code: 0.8)."""
    cutmix: MixingStrength = 0.0
    """Strength of CutMix, which pastes a rectangle of a second image (Yun et al., 2019, arXiv:1905.04899). The first
    image's share is drawn from the distribution Beta(a, a), where a is this value. 0 disables CutMix; Microsoft's
    BEiT-3 code uses 1.0. If `mixup` and `cutmix` are both above 0, each mixed image uses one of the two methods at
    random, with equal probability."""
    mixing_probability: Share = 1.0
    """Probability that a training image is mixed with another image of the same source."""

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
        """Returns the text of a class: the prompt with the class name inserted."""
        return self.prompt.replace(_PLACE, name)

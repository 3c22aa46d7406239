"""Predicts the class of each pixel of whole images, with sliding windows at several scales."""

# C classes.

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3_ds.tasks.segmentation.augmentation import resize_whole, scaled_size, window_starts
from beit3_ds.tasks.segmentation.config import SegmentationConfig

Size = tuple[int, int]
"""Height and width in pixels."""
ScoreWindows = Callable[[Iterable[Sequence[Tensor]]], Iterator[Tensor]]
"""Type of a function that takes batches of windows and yields each batch's class scores, (windows, classes, height,
width). All windows of a batch have one size. A batch may be empty."""


class ScaledImage(NamedTuple):
    """Identifies one image at one scale, flipped or not."""

    image: int
    """Index of the image in the list of images that are predicted together."""
    size: Size
    """Height and width of the scaled image in pixels."""
    is_flipped: bool
    """Whether the image is flipped horizontally."""


class Window(NamedTuple):
    """Holds the position and the size of a window in a scaled image."""

    scaled: ScaledImage
    """The scaled image."""
    top: int
    """First row of the window in the scaled image."""
    left: int
    """First column of the window in the scaled image."""
    size: Size
    """Height and width of the window in pixels."""

    @property
    def place(self) -> tuple[slice, slice]:
        """Returns slices of the window's rows and columns in the scaled image."""
        return slice(self.top, self.top + self.size[0]), slice(self.left, self.left + self.size[1])


@dataclass(frozen=True)
class SlidingWindows:
    """Cuts images into overlapping windows, and merges the windows' class scores."""

    settings: SegmentationConfig
    """The task's settings."""
    crop_size: int
    """Side of training crops in pixels; the maximum side of a window."""

    def cut(self, size: Size, image: int = 0) -> list[Window]:
        """Returns the windows of one image, at all scales and flips.

        Args:
            size: height and width of the image in pixels.
            image: index of the image.
        """
        settings, found = self.settings, []
        for factor in settings.scales:
            scaled = scaled_size(size, factor * (settings.short_side or self.crop_size))
            window = min(scaled[0], self.crop_size), min(scaled[1], self.crop_size)
            tops, lefts = (window_starts(*sides, settings.window_stride) for sides in zip(scaled, window, strict=True))
            for flipped in (False, True)[: 1 + settings.flips]:
                whole = ScaledImage(image, scaled, flipped)
                found += [Window(whole, top, left, window) for top in tops for left in lefts]
        return found

    def plan(self, sizes: Sequence[Size]) -> list[list[Window]]:
        """Returns the windows of several images, grouped into batches.

        A batch has at most `windows_per_batch` windows, all of one size.

        Args:
            sizes: height and width of each image in pixels.
        """
        windows = [window for image, size in enumerate(sizes) for window in self.cut(size, image)]
        found: list[list[Window]] = []
        for window in windows:
            if found and len(found[-1]) < self.settings.windows_per_batch and found[-1][0].size == window.size:
                found[-1].append(window)
            else:
                found.append([window])
        return found

    def predict(self, images: Sequence[Image.Image], score: ScoreWindows, num_batches: int = 0) -> list[Tensor]:
        """Returns the class of each pixel of each image, (height, width) uint8, on the CPU.

        Scores of overlapping windows are averaged. Scores of each scale and flip are resized to the image and averaged.

        Args:
            images: RGB images.
            score: computes the class scores of batches of windows.
            num_batches: minimum number of batches; empty batches are added if the images need fewer.
        """
        plan = self.plan([image.size[::-1] for image in images])
        plan += [[]] * (num_batches - len(plan))
        views = _views(images, itertools.chain.from_iterable(plan))
        batches = (list(itertools.islice(views, len(batch))) for batch in plan)
        totals: dict[int, Tensor] = {}
        merging: _MergedWindows | None = None
        for batch, scores in zip(plan, score(batches), strict=True):
            for window, own in zip(batch, scores, strict=True):
                if merging is None or merging.scaled != window.scaled:
                    _finish(merging, images, totals)
                    merging = _MergedWindows(window.scaled, own)
                merging.add(window, own)
        _finish(merging, images, totals)
        return [totals[number].argmax(0).to(torch.uint8).cpu() for number in range(len(images))]


def _views(images: Sequence[Image.Image], windows: Iterable[Window]) -> Iterator[Tensor]:
    """Yields the pixels of each window, (3, height, width); keeps one scaled image in memory at a time."""
    for scaled, group in itertools.groupby(windows, key=lambda window: window.scaled):
        pixels = resize_whole(images[scaled.image], scaled.size)
        pixels = pixels.flip(-1) if scaled.is_flipped else pixels
        for window in group:
            yield pixels[(slice(None), *window.place)]


class _MergedWindows:
    """Averages the scores of the windows of one scaled image."""

    def __init__(self, scaled: ScaledImage, scores_CHW: Tensor) -> None:
        self.scaled = scaled
        self._sums = scores_CHW.new_zeros(len(scores_CHW), *scaled.size)
        self._counts = scores_CHW.new_zeros(scaled.size)

    def add(self, window: Window, scores_CHW: Tensor) -> None:
        self._sums[(slice(None), *window.place)] += scores_CHW
        self._counts[window.place] += 1

    def resized(self, size: Size) -> Tensor:
        """Returns the mean scores resized to the original image, (classes, height, width); undoes a flip."""
        mean = self._sums / self._counts
        mean = mean.flip(-1) if self.scaled.is_flipped else mean
        return F.interpolate(mean[None], size, mode="bilinear", align_corners=False)[0]


def _finish(merging: _MergedWindows | None, images: Sequence[Image.Image], totals: dict[int, Tensor]) -> None:
    if merging is not None:
        number = merging.scaled.image
        own = merging.resized(images[number].size[::-1])
        totals[number] = totals[number] + own if number in totals else own

"""Computes the recall of a split, and writes the retrieved captions and images as JSON and HTML."""

# I images, X captions, D features.

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_ds.atomic_file import atomic_write
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.samples import Stream
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page
from beit3_ds.tasks.retrieval.neighbours import best_candidates
from beit3_ds.tasks.retrieval.packing import MAX_CAPTIONS
from beit3_ds.tasks.retrieval.recall import match_ranks, recall
from beit3_ds.tasks.retrieval.samples import RetrievalSamples

NUM_LISTED = 10
"""Number of best-scored candidates per query in the JSON file."""
_NUM_SHOWN = 5  # candidates per query on the page
_NOTE = (
    "Rank 1 is the best score. A tie counts against the right candidate. Each image has its captions, and each caption "
    "its image, among all of the split."
)


class Retrieved:
    """Holds the features of all images and captions of a split, and computes recall and best candidates."""

    def __init__(
        self, image_indices: Tensor, image_ID: Tensor, caption_keys: Tensor, text_XD: Tensor, device: torch.device
    ) -> None:
        """Computes two kinds of ranks: for each image, the rank of the highest-scored of its own captions; for each
        caption, the rank of its image.

        A rank is the number of wrong candidates that score higher or tie (`match_ranks`).

        Args:
            image_indices: index of each image in its split, ascending, (images,) int64.
            image_ID: features of images, (images, features).
            caption_keys: key of each caption (`CAPTION_KEYS`), ascending, (captions,) int64.
            text_XD: features of captions, (captions, features).
            device: device on which scores are computed.
        """
        self.image_indices, self.caption_keys = image_indices, caption_keys
        self._image_ID, self._text_XD = image_ID.to(device), text_XD.to(device)
        owner_X = torch.searchsorted(image_indices, caption_keys // MAX_CAPTIONS)
        self.image_of_text: list[int] = owner_X.tolist()
        self.texts_of_image: list[list[int]] = [[] for _ in range(len(image_indices))]
        for text, image in enumerate(self.image_of_text):
            self.texts_of_image[image].append(text)
        self.text_ranks = match_ranks(self._image_ID, self._text_XD, self.texts_of_image)
        self.image_ranks = match_ranks(self._text_XD, self._image_ID, [[image] for image in self.image_of_text])

    def metrics(self) -> dict[str, float]:
        """Returns recall at 1, 5 and 10 in both directions, and the mean of these six values.

        The names are `text_recall@K` and `image_recall@K` for K = 1, 5 and 10, and `mean_recall`.
        """
        found = recall(self.text_ranks, "text_recall") | recall(self.image_ranks, "image_recall")
        return found | {"mean_recall": sum(found.values()) / len(found)}

    def best_texts(self) -> tuple[Tensor, Tensor]:
        """Returns the indices of the best-scored captions of each image, and the scores of these captions. Both have
        the shape (images, candidates).
        """
        return best_candidates(self._image_ID, self._text_XD, NUM_LISTED)

    def best_images(self) -> tuple[Tensor, Tensor]:
        """Returns the best-scored images of each caption and their scores, each (captions, candidates)."""
        return best_candidates(self._text_XD, self._image_ID, NUM_LISTED)


@dataclass(frozen=True, kw_only=True)
class ResultFiles:
    """Writes the retrieval results of a split as JSON and as an HTML page."""

    stream: Stream
    """Samples of the split, which provide names, captions and images."""
    retrieved: Retrieved
    """Features and retrieval ranks of all images and captions of the split."""

    def write(self, folder: ResultFolder, metrics: Mapping[str, float], num_shown: int) -> None:
        """Writes `retrieval.json` and `retrieval.html`.

        Args:
            folder: folder to write to.
            metrics: metrics of the split.
            num_shown: number of images and, separately, of captions on the page. The page shows the best captions for
                each of these images, and the best images for each of these captions.
        """
        texts, text_scores = self.retrieved.best_texts()
        images, image_scores = self.retrieved.best_images()
        content = {
            "metrics": dict(metrics),
            "images": list(self._image_entries(texts.tolist(), text_scores.tolist())),
            "captions": list(self._text_entries(images.tolist(), image_scores.tolist())),
        }
        folder.write("retrieval.json", lambda path: _write_json(path, content))
        folder.write("retrieval.html", lambda path: self._write_page(path, metrics, texts, images, num_shown))

    def _write_page(
        self, path: Path, metrics: Mapping[str, float], texts: Tensor, images: Tensor, num_shown: int
    ) -> None:
        shown = [*self._shown_images(texts, num_shown), *self._shown_texts(images, num_shown)]
        write_result_page(path, "Images and captions that find each other", metrics, shown, _NOTE)

    def _image_entries(self, texts: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> Iterator[Any]:
        for image, rank in enumerate(self.retrieved.text_ranks.tolist()):
            right = set(self.retrieved.texts_of_image[image])
            found = [
                {"caption": self._caption(text), "score": round(score, 6), "is_right": text in right}
                for text, score in zip(texts[image], scores[image], strict=True)
            ]
            yield {"image": self._identifier(image), "rank": rank + 1, "found": found}

    def _text_entries(self, images: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> Iterator[Any]:
        for text, rank in enumerate(self.retrieved.image_ranks.tolist()):
            right = self.retrieved.image_of_text[text]
            found = [
                {"image": self._identifier(image), "score": round(score, 6), "is_right": image == right}
                for image, score in zip(images[text], scores[text], strict=True)
            ]
            caption = {"caption": self._caption(text), "image": self._identifier(right)}
            yield {**caption, "rank": rank + 1, "found": found}

    def _shown_images(self, texts: Tensor, count: int) -> Iterator[ShownSample]:
        ranks = self.retrieved.text_ranks.tolist()
        for image in choose_shown([rank == 0 for rank in ranks], count):
            own = self.retrieved.texts_of_image[image]
            lines = {"people": " / ".join(map(self._caption, own)), "rank": str(ranks[image] + 1)}
            for place, text in enumerate(texts[image, :_NUM_SHOWN].tolist()):
                lines[f"model {place + 1}"] = self._caption(text) + (" (right)" if text in own else "")
            title = f"Captions for {self._identifier(image)}"
            yield ShownSample(images=[self._image(image)], title=title, lines=lines, is_right=ranks[image] == 0)

    def _shown_texts(self, images: Tensor, count: int) -> Iterator[ShownSample]:
        ranks = self.retrieved.image_ranks.tolist()
        for text in choose_shown([rank == 0 for rank in ranks], count):
            found = images[text, :_NUM_SHOWN].tolist()
            right = self.retrieved.image_of_text[text]
            place = f"number {found.index(right) + 1} from the left" if right in found else "not shown"
            lines = {"right image": f"{self._identifier(right)}, {place}", "rank": str(ranks[text] + 1)}
            yield ShownSample(
                images=[self._image(image) for image in found],
                title=f"Images for: {self._caption(text)}",
                lines=lines,
                is_right=ranks[text] == 0,
            )

    def _locate(self, image: int) -> tuple[RetrievalSamples, int]:
        samples, index = self.stream.sources.locate(int(self.retrieved.image_indices[image]))
        assert isinstance(samples, RetrievalSamples), "the stream of pairs has other samples"
        return samples, index

    def _identifier(self, image: int) -> int | str:
        samples, index = self._locate(image)
        return samples.identifier(index)

    def _caption(self, text: int) -> str:
        samples, index = self._locate(self.retrieved.image_of_text[text])
        return samples.captions(index)[int(self.retrieved.caption_keys[text]) % MAX_CAPTIONS]

    def _image(self, image: int) -> Any:
        samples, index = self._locate(image)
        try:
            return samples.source.image(index)
        except BrokenRecordError as error:
            raise AssertionError("the image was read in this evaluation") from error


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

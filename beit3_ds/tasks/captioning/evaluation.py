"""Predicts masked words and generates captions for all images of a split."""

# P pairs, M masked tokens, V vocabulary.

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.data.samples import Split, Stream
from beit3_ds.model import TaskModel
from beit3_ds.model.generation import BeamSearch, generate
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.captioning.head import TARGET_IDS
from beit3_ds.tasks.captioning.packing import INDICES, NUM_MASKED
from beit3_ds.tasks.captioning.samples import CaptionSamples
from beit3_ds.tasks.captioning.score import Identifier, score_captions, write_caption_results
from beit3_ds.tasks.rank_task import Evaluator
from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page
from beit3_ds.tasks.results import GatheredResults, SampleResults
from beit3_ds.tokenizers.text import TextTokenizer

RESULTS, PAGE = "captions.json", "captions.html"
"""Names of the result files: captions in the format of the evaluation servers, and an HTML page."""


def describe_missing_generation(evaluator: Evaluator) -> str:
    """Returns why captions cannot be generated with this layout of ranks; empty if generation is possible."""
    mesh, model = evaluator.mesh, evaluator.model
    if mesh.pipeline.size > 1:
        return "pipeline stages divide the model"
    if mesh.tensor.divides_rows:
        return "sequence parallelism divides the rows of captions"
    if not isinstance(model, TaskModel) or any(not parameter.numel() for parameter in model.parameters()):
        return "ZeRO-3 divides the parameters"
    return ""


def predict_split(
    evaluator: Evaluator,
    split: Split,
    label_smoothing: float,
    search: BeamSearch | None,
    tokenizer: TextTokenizer | None,
) -> GatheredResults | None:
    """Predicts the masked words of every caption of a split, and may generate captions.

    All ranks must call this function.

    Args:
        evaluator: gives access to the model and the ranks.
        split: name of the split.
        label_smoothing: total probability of all wrong words in a smoothed label.
        search: settings of the beam search; None generates no captions.
        tokenizer: converts token ids to text; needed with `search`.

    Returns:
        Results per sample on the main rank; None on other ranks. `masked` is the number of masked words, `loss` the
        summed loss of these words, and `found` the number of right predictions. With `search`, `caption` is the
        generated caption and `length` is its number of tokens.
    """
    results = SampleResults()
    for batch, logits_MV in evaluator.predict(evaluator.batches(split)):
        if logits_MV is None:
            continue
        captions = []
        if search is not None:  # tensor-parallel ranks generate captions together
            assert isinstance(evaluator.model, TaskModel) and batch.pixels is not None and tokenizer is not None
            captions = generate(evaluator.model, batch.pixels, tokenizer, search)
        if evaluator.mesh.tensor.rank:
            continue
        counts_P, targets_M = batch.targets[NUM_MASKED], batch.targets[TARGET_IDS]
        loss_M = smoothed_loss(logits_MV, targets_M, label_smoothing)
        found_M = (logits_MV.argmax(1) == targets_M).double()
        rows: dict[str, Tensor | list[str]] = {"masked": counts_P}
        rows |= {"loss": _sums(loss_M, counts_P), "found": _sums(found_M, counts_P)}
        if search is not None:
            assert tokenizer is not None
            rows["caption"] = [tokenizer.decode(caption.ids) for caption in captions]
            rows["length"] = torch.tensor([len(caption.ids) for caption in captions], dtype=torch.int64)
        results.add(batch.targets[INDICES], **rows)
    return results.gather(evaluator.mesh)


def smoothed_loss(logits_MV: Tensor, targets_M: Tensor, smoothing: float) -> Tensor:
    """Returns the loss of each masked token, (masked tokens,) float64: KL(smoothed label || prediction).

    Args:
        logits_MV: logits of all words, (masked tokens, vocabulary).
        targets_M: ids of the right words, (masked tokens,) int64.
        smoothing: total probability of all wrong words in the smoothed label.
    """
    log_probs_MV = logits_MV.double().log_softmax(1)
    right_M = log_probs_MV.gather(1, targets_M[:, None])[:, 0]
    if not smoothing:
        return -right_M
    share = smoothing / (logits_MV.shape[1] - 1)
    constant = (1 - smoothing) * math.log1p(-smoothing) + smoothing * math.log(share)
    return constant - (1 - smoothing - share) * right_M - share * log_probs_MV.sum(1)


def _sums(values_M: Tensor, counts_P: Tensor) -> Tensor:
    """Sums values of masked tokens per caption, (masked tokens,) -> (captions,) float64."""
    captions_M = torch.arange(len(counts_P), device=values_M.device).repeat_interleave(counts_P)
    return torch.zeros(len(counts_P), dtype=torch.float64, device=values_M.device).index_add_(0, captions_M, values_M)


class DescribedSplit:
    """Computes the metrics of a split and writes the generated captions, on the main rank.

    Without generated captions, there are only the metrics of the masked words, and nothing is written.
    """

    def __init__(self, stream: Stream, results: GatheredResults, search: BeamSearch | None) -> None:
        """Stores the samples and the gathered results.

        Args:
            stream: samples of the split.
            results: result of `predict_split`.
            search: settings of the beam search; None if no captions were generated.
        """
        self._results, self._search = results, search
        places = [stream.sources.locate(index) for index in results.indices.tolist()]
        self._samples: list[tuple[CaptionSamples, int]] = []
        for samples, index in places:
            assert isinstance(samples, CaptionSamples)
            self._samples.append((samples, index))
        self._captions = results.strings("caption")
        self._references = [samples.captions(index) for samples, index in self._samples]

    def metrics(self, *, official: bool) -> dict[str, float]:
        """Returns the metrics of the split, by name.

        `words` is the mean loss of the masked words, and `word_accuracy` is the accuracy on these words. If captions
        were generated, `ended` is the share of captions that end before the length limit. If captions were generated
        and all images have references, the metrics of `score_captions` are added.

        Args:
            official: whether `score_captions` also computes the official metrics. An official metric that cannot be
                computed is left out, and the reason is printed.
        """
        found: dict[str, float] = {}
        if num_masked := int(self._results.tensor("masked").sum()):
            found["words"] = self._results.tensor("loss").sum().item() / num_masked
            found["word_accuracy"] = self._results.tensor("found").sum().item() / num_masked
        if self._search is None:
            return found
        # A caption of max_length - 3 words counts as cut off, even if it ended with EOS at this length.
        is_short = self._results.tensor("length") < self._search.max_length - 3
        found["ended"] = is_short.double().mean().item()
        if all(self._references):
            scores = score_captions(self._by_identifier(), self._references_by_identifier(), official=official)
            for reason in dict.fromkeys(scores.unavailable.values()):
                names = ", ".join(name for name, why in scores.unavailable.items() if why == reason)
                print(f"captions: {names} unavailable: {reason}", flush=True)
            found |= scores.scores
        return found

    def write(self, folder: ResultFolder, metrics: Mapping[str, float], shown: int) -> None:
        """Writes the generated captions as JSON, and a page with at most `shown` images.

        If no captions were generated, nothing is written.
        """
        if self._search is None:
            return
        folder.write(RESULTS, functools.partial(write_caption_results, captions=self._by_identifier()))
        page = functools.partial(self._write_page, metrics=metrics, shown=shown)
        folder.write(PAGE, page)

    def _by_identifier(self) -> dict[Identifier, str]:
        return {
            samples.identifier(index): caption
            for (samples, index), caption in zip(self._samples, self._captions, strict=True)
        }

    def _references_by_identifier(self) -> dict[Identifier, list[str]]:
        return {
            samples.identifier(index): references
            for (samples, index), references in zip(self._samples, self._references, strict=True)
        }

    def _write_page(self, path: Path, metrics: Mapping[str, float], shown: int) -> None:
        chosen = choose_shown([None] * len(self._samples), shown)
        note = f"{len(chosen)} of {len(self._samples)} images, evenly spread."
        write_result_page(path, "Captions", metrics, [self._shown(place) for place in chosen], note)

    def _shown(self, place: int) -> ShownSample:
        samples, index = self._samples[place]
        caption, references = self._captions[place], self._references[place]
        lines = {"people": " / ".join(references)} if references else {}
        is_right = True if caption in references else None
        return ShownSample(images=[samples.source.image(index, 256)], title=caption, lines=lines, is_right=is_right)

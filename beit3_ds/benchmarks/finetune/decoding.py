"""Generates captions with torchscale's BEiT-3 and with transformers' BLIP.

BEiT-3 generates captions as in microsoft/unilm's `beit3`: it encodes each image once per beam, and keeps finished
captions in the batch until all captions are finished. So finished captions still cost time.
"""

# I images, B beams, R = I * B captions, V vocabulary.

import importlib.util
from typing import Any

import torch
from torch import Tensor

from beit3_ds.benchmarks.finetune.cases import BOS, EOS, PAD
from beit3_ds.benchmarks.finetune.reference import ReferenceModel, caption_mask

_CANDIDATES_PER_BEAM = 3


class _Hypotheses:
    """Keeps the best of the complete captions that beam search has found for one image."""

    def __init__(self, max_length: int, length_penalty: float) -> None:
        self.best, self.score = [BOS], -float("inf")
        self._max_length, self._length_penalty = max_length, length_penalty

    def add(self, ids: list[int], log_probability: float) -> None:
        score = log_probability / len(ids) ** self._length_penalty
        if score > self.score:
            self.best, self.score = ids, score

    def is_done(self, best_log_probability: float) -> bool:
        return self.score >= best_log_probability / (self._max_length - 1) ** self._length_penalty


@torch.no_grad()
def reference_captions(
    model: ReferenceModel, pixels: Tensor, num_beams: int, length_penalty: float, max_length: int
) -> list[list[int]]:
    """Generates captions by beam search, and returns each image's best caption: token ids without BOS and EOS.

    Args:
        model: reference model with a captioning head, in evaluation mode.
        pixels: images, (I, 3, image_size, image_size).
        num_beams: beams per image, B.
        length_penalty: exponent p. A caption's score is the log-probability divided by length ** p.
        max_length: maximum number of tokens, counting BOS, EOS and the mask token. A caption has at most `max_length` -
            3 ids.
    """
    count, device = len(pixels), pixels.device
    state: dict[int, dict[str, Tensor]] = {layer: {} for layer in range(len(model.beit3.encoder.layers))}
    captions = [[BOS] for _ in range(count * num_beams)]
    found = [_Hypotheses(max_length, length_penalty) for _ in range(count)]
    done = [False] * count
    scores_R = torch.full((count, num_beams), -1e9, device=device)
    scores_R[:, 0] = 0
    scores_R = scores_R.flatten()
    images: Tensor | None = pixels.repeat_interleave(num_beams, dim=0)
    while len(captions[0]) + 1 < max_length and not all(done):
        logits_RV = _next_logits(model, captions, images, state)
        images = None
        totals_RV = torch.log_softmax(logits_RV, dim=1) + scores_R[:, None]
        best = totals_RV.view(count, -1).topk(_CANDIDATES_PER_BEAM * num_beams, dim=1)
        beams: list[tuple[float, int, int]] = []
        for image in range(count):
            done[image] = done[image] or found[image].is_done(float(best.values[image, 0]))
            if done[image]:
                beams += [(0.0, PAD, image * num_beams)] * num_beams
                continue
            candidates = zip(best.values[image].tolist(), best.indices[image].tolist(), strict=True)
            chosen: list[tuple[float, int, int]] = []
            for score, index in candidates:
                beam, word = divmod(index, logits_RV.shape[1])
                row = image * num_beams + beam
                if word == EOS or len(captions[row]) + 2 == max_length:
                    found[image].add([*captions[row], model.mask_id], score)
                else:
                    chosen.append((score, word, row))
                if len(chosen) == num_beams:
                    break
            beams += chosen or [(0.0, PAD, image * num_beams)] * num_beams
        scores_R = torch.tensor([score for score, _, _ in beams], device=device)
        captions = [[*captions[row], word] for _, word, row in beams]
        _reorder(state, torch.tensor([row for _, _, row in beams], device=device))
    return [hypotheses.best[1:-1] for hypotheses in found]


def _next_logits(
    model: ReferenceModel, captions: list[list[int]], images: Tensor | None, state: dict[int, dict[str, Tensor]]
) -> Tensor:
    """Returns the logits of each caption's next token, (captions, vocabulary).

    BEiT-3 predicts the next token at a mask token, which follows the caption's last token. The cache, `state`, gets the
    last token and the mask token.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([[caption[-1], model.mask_id] for caption in captions], device=device)
    length, image_rows = len(captions[0]) + 1, model.beit3.vision_embed.num_position_embeddings()
    mask, positions = caption_mask(image_rows, length, device), None
    if images is None:
        mask, positions = mask[-2:], torch.arange(length, length + 2, device=device)[None]
    y_RSD = model.beit3(
        textual_tokens=tokens, visual_tokens=images, attn_mask=mask, incremental_state=state, positions=positions
    )["encoder_out"]
    logits_RV: Tensor = model.mlm_head(y_RSD[:, -1])
    return logits_RV


def _reorder(state: dict[int, dict[str, Tensor]], rows: Tensor) -> None:
    """Selects the beams whose indices are in `rows` from the cache, and removes the mask token of each beam."""
    for layer in state.values():
        for key, cached in layer.items():
            layer[key] = cached.index_select(0, rows)[:, :, :-1]


def has_blip() -> bool:
    """Returns whether transformers, which contains BLIP, is installed."""
    return importlib.util.find_spec("transformers") is not None


def build_blip(image_size: int) -> Any:
    """Builds transformers' BLIP base with random weights (Li et al., 2022, arXiv:2201.12086)."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    return BlipForConditionalGeneration(BlipConfig(vision_config={"image_size": image_size})).eval()


@torch.no_grad()
def blip_captions(model: Any, pixels: Tensor, num_beams: int, max_length: int) -> None:
    """Generates captions of maximum length with BLIP. Only the time matters, so nothing is returned."""
    model.generate(pixel_values=pixels, num_beams=num_beams, max_length=max_length, min_length=max_length)

"""Writes a page with the model's predictions for validation samples."""

import base64
import html
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beit3_ds.atomic_file import atomic_write
from beit3_ds.batch import PackedBatch
from beit3_ds.pixels import to_floats
from beit3_ds.tasks.pretraining.heads import Logits
from beit3_ds.tasks.pretraining.targets import MASKED_TOKENS, TARGET_IDS, TOKENIZER_PIXELS, Encode, encode_images
from beit3_ds.tokenizers.text import TextTokenizer

_SHOWN = 12
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
img{image-rendering:pixelated;width:112px;height:112px;margin-right:6px;border:1px solid #ccc}
.hit{background:#c8efc8}.miss{background:#f6d0d0}.sample{margin:1.2em 0;border-bottom:1px solid #ddd}
small{color:#666}figure{display:inline-block;margin:0}figcaption{font-size:12px;color:#666}"""


def write_predictions(
    batch: PackedBatch,
    logits: Logits,
    text_tokenizer: TextTokenizer | None,
    encode: Encode | None,
    path: Path,
) -> None:
    """Writes the model's predictions for one validation batch as a self-contained HTML page.

    The page shows at most 12 pairs, 12 images and 12 texts. For each masked token, it shows the model's guess and, if
    the guess is wrong, the original token. A right guess is green. For each image, it shows mosaics of the predicted
    and the true visual codes. A mosaic draws each code as the mean of the batch's patches with this code.

    Args:
        batch: a validation micro-batch.
        logits: the model's logits at the masked positions of the batch.
        text_tokenizer: converts token ids to words; None without texts.
        encode: encodes images on this rank alone; None without images.
        path: .html file to write.
    """
    mosaics = _Mosaics(batch, logits, encode)
    words = _Words(batch, logits, text_tokenizer)
    pairs = [
        f'<div class="sample">{mosaics.figures(batch.num_images + i)}<p>{words.sentence(i)}</p></div>'
        for i in range(min(batch.num_pairs, _SHOWN))
    ]
    images = [f'<div class="sample">{mosaics.figures(i)}</div>' for i in range(min(batch.num_images, _SHOWN))]
    texts = [
        f'<div class="sample"><p>{words.sentence(batch.num_pairs + i)}</p></div>'
        for i in range(min(batch.num_texts, _SHOWN))
    ]
    sections = [("Image-text pairs", pairs), ("Images", images), ("Texts", texts)]
    body = "".join(f"<h2>{title}</h2>{''.join(rows)}" for title, rows in sections if rows)
    note = (
        "<p>Validation samples. A masked token shows the guess, then the truth: <span class=hit>right</span>, "
        "<span class=miss>guess</span> <small>truth</small>. Mosaics draw every visual code as the mean patch of the "
        "shown batch that has it.</p>"
    )
    page = f"<!doctype html><meta charset=utf-8><title>Predictions</title><style>{_STYLE}</style><h1>Predictions</h1>"
    with atomic_write(path) as file:
        file.write((page + note + body).encode())


class _Words:
    def __init__(self, batch: PackedBatch, logits: Logits, tokenizer: TextTokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.lengths = [*batch.caption_lengths, *batch.text_lengths]
        self.ids = batch.token_ids.tolist()
        num_ids = tokenizer.vocab_size if tokenizer else logits.text.shape[1]
        guesses = logits.text[:, :num_ids].argmax(1).tolist()  # the table may have more rows than there are tokens
        truths = batch.targets[TARGET_IDS].tolist()
        self.masked = dict(zip(batch.targets[MASKED_TOKENS].tolist(), zip(guesses, truths, strict=True), strict=True))

    def sentence(self, text: int) -> str:
        """Returns the caption or text with index `text` in the batch, as HTML."""
        start = sum(self.lengths[:text])
        return "".join(self._token(position) for position in range(start, start + self.lengths[text]))

    def _token(self, position: int) -> str:
        if position not in self.masked:
            return self._show(self.ids[position])
        guess, truth = self.masked[position]
        if guess == truth:
            return f'<span class="hit">{self._show(guess)}</span>'
        return f'<span class="miss">{self._show(guess)}</span><small>{self._show(truth)}</small>'

    def _show(self, token: int) -> str:
        assert self.tokenizer is not None, "words need a text tokenizer"
        return html.escape(self.tokenizer.piece(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " "))


class _Mosaics:
    def __init__(self, batch: PackedBatch, logits: Logits, encode: Encode | None) -> None:
        self.batch = batch
        self.patches = _cut(to_floats(batch.targets[TOKENIZER_PIXELS], batch.colors).cpu(), batch.patch_mask.shape[1])
        self.codes = encode_images(batch, encode).cpu()
        self.guessed = self.codes.clone()
        self.guessed[batch.patch_mask.cpu()] = logits.visual.argmax(1).cpu()
        self.palette = self._mean_patches(int(logits.visual.shape[1]))

    def figures(self, image: int) -> str:
        """Returns four pictures of an image as HTML: original, masked, predicted codes and true codes."""
        patches, mask = self.patches[image], self.batch.patch_mask[image].cpu()
        gray = torch.zeros_like(patches)
        hidden = mask.view(-1, 1, 1, 1)
        pictures = {
            "original": patches,
            "masked": torch.where(hidden, gray, patches),
            "predicted": torch.where(hidden, self.palette[self.guessed[image]], patches),
            "true codes": self.palette[self.codes[image]],
        }
        return "".join(
            f"<figure><img src='{_png(_join(p))}'><figcaption>{name}</figcaption></figure>"
            for name, p in pictures.items()
        )

    def _mean_patches(self, num_codes: int) -> Tensor:
        flat = self.patches.flatten(0, 1)
        sums = torch.zeros(num_codes, *flat.shape[1:]).index_add_(0, self.codes.flatten(), flat)
        counts = torch.bincount(self.codes.flatten(), minlength=num_codes).clamp(min=1)
        return sums / counts.view(-1, 1, 1, 1)


def _cut(pixels: Tensor, num_patches: int) -> Tensor:
    """Cuts images into patches, (images, 3, size, size) -> (images, patches, 3, patch size, patch size)."""
    grid = int(num_patches**0.5)
    rows = pixels.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # B 3 g p g p
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _join(patches: Tensor) -> Tensor:
    """Joins the patches of one image, (patches, 3, patch size, patch size) -> (3, size, size)."""
    grid = int(len(patches) ** 0.5)
    return patches.unflatten(0, (grid, grid)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def _png(pixels: Tensor) -> str:
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

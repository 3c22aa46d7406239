"""Training of the visual tokenizer: reconstruct a teacher's features from codes (BEiT v2, sec. 2.2 and 3.1)."""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, RandomSampler

from beit3_ds.config import ConfigError, RunConfig, VisualTokenizerConfig
from beit3_ds.tokenizers import OrientedGradients, VisualTokenizer, save_visual_tokenizer

_ADAM_BETAS = (0.9, 0.99)
_FINAL_LEARNING_RATE = 1e-5  # share of the peak
_USAGE_IMAGES = 4096  # images over which the finished tokenizer's codes are counted, at most
_START_VECTORS_PER_CODE = 16  # BEiT v2's first batch has 512 * 196 / 8192 = 12
_LOW_USAGE = 0.5  # BEiT v2 reports 97 to 100% on ImageNet; below a half the codebook has collapsed or is too large


@dataclass(frozen=True, kw_only=True)
class CodeUsage:
    """How evenly codes are used over some images."""

    num_codes: int
    """Codes that occur at least once."""
    codebook_size: int
    """Codes there are."""
    perplexity: float
    """exp(entropy) of the codes' frequencies: between 1 and `codebook_size`."""

    def __str__(self) -> str:
        return f"{self.num_codes} of {self.codebook_size} codes used, perplexity {self.perplexity:.0f}"


def measure_code_usage(batches: Iterable[Tensor], codebook_size: int) -> CodeUsage:
    """Counts codes over batches of any shape, int64 in [0, codebook_size)."""
    counts = torch.zeros(codebook_size, dtype=torch.float64)
    for codes in batches:
        counts += torch.bincount(codes.flatten(), minlength=codebook_size).cpu()
    shares = counts[counts > 0] / counts.sum()
    perplexity = math.exp(-(shares * shares.log()).sum().item())
    return CodeUsage(num_codes=len(shares), codebook_size=codebook_size, perplexity=perplexity)


def train_visual_tokenizer(
    config: RunConfig,
    images: Dataset[Tensor],
    *,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = print,
) -> CodeUsage:
    """Trains the tokenizer of `config.tokenizers.visual` in this process and writes its file.

    Loss: mean of 1 - cos(reconstruction, teacher's features without their mean) over all patches, plus
    `commitment_weight` times the commitment loss. In the first `continuous_steps` the decoder sees the encoder's own
    vectors; then k-means starts the codebook.

    Args:
        config: the run; `tokenizers.visual`, `training.seed`, `training.log_interval` and `data.num_workers` are read.
        images: a map-style dataset of (3, image_size, image_size) float32 views in [-1, 1]. Its indices are shuffled
            anew whenever all have been drawn, so views that differ between epochs are indices of their own.
        device: where the networks run.
        report: receives progress lines.

    Returns:
        The use of the finished tokenizer's codes over at most 4096 of the images.

    Raises:
        ConfigError: if there are no images, or they are not of the configured size.
    """
    visual = config.tokenizers.visual
    _check_images(images, visual.image_size)
    teacher = OrientedGradients(visual.patch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        tokenizer = VisualTokenizer(visual, teacher.width).to(device).train()
    optimizer, schedule = _build_optimizer(tokenizer)
    progress = _Progress(visual, report)
    start_views = [view.to(device) for view in _build_loader(config, images, num_samples=_num_start_images(visual))]
    # Without its mean, which white backgrounds rule, a constant reconstruction scores 0 instead of most of the cosine.
    center = torch.cat([teacher(pixels) for pixels in start_views]).mean(dim=(0, 1))
    batches = _build_loader(config, images, num_samples=visual.training_steps * visual.batch_size)
    for step, pixels in enumerate(batches, start=1):
        if step == visual.continuous_steps + 1:
            _start_codebook(tokenizer, start_views)
        pixels = pixels.to(device)
        reconstruction, commitment, codes = _reconstruct(tokenizer, pixels)
        cosine = F.cosine_similarity(reconstruction.float(), teacher(pixels) - center, dim=-1).mean()
        loss = 1 - cosine + visual.commitment_weight * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 1 or step % config.training.log_interval == 0 or step == visual.training_steps:
            usage = None if codes is None else measure_code_usage([codes], visual.codebook_size)
            progress.show(step, loss.item(), cosine.item(), usage)
    save_visual_tokenizer(visual.path, tokenizer)
    views = _build_loader(config, images, num_samples=min(_USAGE_IMAGES, _length(images)))
    usage = measure_code_usage((tokenizer.encode(pixels.to(device)) for pixels in views), visual.codebook_size)
    report(f"visual tokenizer: wrote {visual.path}; {usage} over the training images")
    _warn_if_collapsed(usage)
    return usage


def _reconstruct(tokenizer: VisualTokenizer, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reconstruction, commitment loss and codes; before the codebook has started, from vectors that have no code."""
    if tokenizer.quantize.started:
        reconstruction, commitment, codes = tokenizer(pixels)
        return reconstruction, commitment, codes
    return tokenizer.decode(tokenizer.project(pixels)), pixels.new_zeros(()), None


def _num_start_images(visual: VisualTokenizerConfig) -> int:
    """Images whose vectors start the codebook: a batch, or more where a small batch has too few vectors a code."""
    return max(visual.batch_size, -(-_START_VECTORS_PER_CODE * visual.codebook_size // visual.grid_size**2))


@torch.no_grad()
def _start_codebook(tokenizer: VisualTokenizer, views: list[Tensor]) -> None:
    vectors = torch.cat([tokenizer.project(pixels) for pixels in views])
    tokenizer.quantize.start(vectors.flatten(0, 1))


def _build_optimizer(tokenizer: VisualTokenizer) -> tuple[AdamW, LambdaLR]:
    """AdamW without decay on biases, norms, positions and class tokens; linear warmup, then cosine."""
    visual = tokenizer.config
    named = list(tokenizer.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))]
    others = [p for name, p in named if p.ndim <= 1 or name.endswith(("pos_embed", "cls_token"))]
    groups = [{"params": decayed, "weight_decay": visual.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=visual.learning_rate, betas=_ADAM_BETAS)

    def factor(step: int) -> float:
        if step < visual.warmup_steps:
            return (step + 1) / visual.warmup_steps
        done = (step - visual.warmup_steps) / max(1, visual.training_steps - visual.warmup_steps)
        return _FINAL_LEARNING_RATE + (1 - _FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * done)) / 2

    return optimizer, LambdaLR(optimizer, factor)


def _build_loader(config: RunConfig, images: Dataset[Tensor], num_samples: int) -> DataLoader[Tensor]:
    """Batches of `num_samples` views: permutation after permutation of the dataset, seeded by the run."""
    generator = torch.Generator().manual_seed(config.training.seed)
    sampler = RandomSampler(images, num_samples=num_samples, generator=generator)  # type: ignore[arg-type]
    return DataLoader(images, config.tokenizers.visual.batch_size, sampler=sampler, num_workers=config.data.num_workers)


def _length(images: Dataset[Tensor]) -> int:
    return len(images)  # type: ignore[arg-type]  # Dataset itself declares no length; map-style ones have one


def _check_images(images: Dataset[Tensor], image_size: int) -> None:
    if _length(images) == 0:
        raise ConfigError("tokenizers.visual: there are no images to train on; see data.images and data.pairs 'train'.")
    shape, wanted = tuple(images[0].shape), (3, image_size, image_size)
    if shape != wanted:
        raise ConfigError(
            f"tokenizers.visual: training images have shape {shape}, image_size={image_size} needs {wanted}. "
            f"Build the views with tokenizers.visual.image_size."
        )


class _Progress:
    """Writes one line of figures for every logged step."""

    def __init__(self, visual: VisualTokenizerConfig, report: Callable[[str], None]) -> None:
        self._visual = visual
        self._report = report
        self._start = time.perf_counter()

    def show(self, step: int, loss: float, cosine: float, usage: CodeUsage | None) -> None:
        """Reports a step; `usage` is that of its batch, None before there are codes."""
        seconds = time.perf_counter() - self._start
        rate = step * self._visual.batch_size / seconds
        left = seconds / step * (self._visual.training_steps - step)
        self._report(
            f"visual tokenizer: step {step}/{self._visual.training_steps}  loss {loss:.4f}  cosine {cosine:.4f}  "
            f"{usage or 'no codes yet'}  {rate:.0f} images/s  {left:.0f} s left"
        )


def _warn_if_collapsed(usage: CodeUsage) -> None:
    if usage.num_codes < _LOW_USAGE * usage.codebook_size:
        warnings.warn(
            f"visual tokenizer: only {usage}: most of the MIM head would learn nothing. Use a smaller codebook_size "
            f"(with model.visual_vocab_size), more varied images, a lower learning_rate, or more "
            f"continuous_steps before the codebook starts.",
            stacklevel=3,
        )

"""Trains the visual tokenizer to reconstruct a teacher's features from codes (BEiT v2, sec. 2.2 and 3.1).

Uses torch's DistributedDataParallel instead of DeepSpeed's engine. A tokenizer of base size has 107M parameters, which
fit on every device, and the DeepSpeed keys of the JSON file configure the pretraining.
"""

import socket
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from beit3_ds.config import ConfigError, RunConfig, VisualTokenizerConfig
from beit3_ds.data import Views, WaitLimits, build_view_loader
from beit3_ds.parallel import Mesh
from beit3_ds.parallel.host_group import HostGroup
from beit3_ds.tokenizers import VisualTokenizer, build_teacher, save_visual_tokenizer
from beit3_ds.tokenizers.recipe import save_recipe, visual_recipe
from beit3_ds.training.agreement import check_same_files
from beit3_ds.training.broken_records import BrokenRecords, format_new_records
from beit3_ds.training.code_usage import CodeCounter, CodeUsage, measure_code_usage
from beit3_ds.training.learning_rate import tokenizer_learning_rate
from beit3_ds.training.tokenizer_checkpoint import TokenizerCheckpoint

_ADAM_BETAS = (0.9, 0.99)
_USAGE_IMAGES = 1024  # images whose codes are counted at the end, at most
_START_VECTORS_PER_CODE = 16  # BEiT v2's first batch has 512 * 196 / 8192 = 12


def train_visual_tokenizer(
    config: RunConfig,
    images: Views,
    *,
    mesh: Mesh | None = None,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = print,
) -> CodeUsage:
    """Trains the tokenizer of `config.tokenizers.visual` and writes its file; resumes from a checkpoint, if any.

    The loss is the mean of 1 - cos(reconstruction, teacher's features without their mean) over all patches, plus
    `commitment_weight` times the commitment loss. In the first `continuous_steps` steps the decoder gets the encoder's
    vectors without quantization; then k-means initialises the codebook.

    The result depends on the seed, but not on the number of ranks, except for rounding. Resumed and uninterrupted
    training give the same bits if all-reduce is deterministic. Each step all-reduces the gradients and the statistics
    of the codebook.

    Args:
        config: the configuration; `tokenizers.visual`, `training.seed`, `training.log_interval` and `data` are used.
            The train files are compared with those of the checkpoint.
        images: views by position in an endless order; its length is that of one epoch. Step s uses the positions
            [s * batch_size, (s + 1) * batch_size), and each rank reads its part of them.
        mesh: ranks that train together; None is this process alone.
        device: device of this rank.
        report: receives progress lines on the main rank.

    Returns:
        Usage of the finished tokenizer's codes over at most 1024 of the images.

    Raises:
        ConfigError: if there are no images, their size is not the configured one, the number of ranks does not divide
            `batch_size`, too many images are broken, or the checkpoint has another recipe.
    """
    training = _Training(config, images, mesh, torch.device(device), report if _is_main(mesh) else _silent)
    training.do_steps()
    return training.finish()


class _Training:
    """Holds the parts of one training and its loop."""

    def __init__(
        self,
        config: RunConfig,
        images: Views,
        mesh: Mesh | None,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        visual = config.tokenizers.visual
        _check_images(images, visual.image_size)
        _check_batch_size(visual.batch_size, mesh)
        self.config, self.visual, self.images = config, visual, images
        self.mesh, self.device, self.report = mesh, device, report
        self.group = None if mesh is None else mesh.data_parallel_group
        self.teacher = build_teacher(visual, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            self.tokenizer = VisualTokenizer(visual, self.teacher.width).to(device).train()
        self.optimizer = build_tokenizer_optimizer(self.tokenizer)
        self.network = _join_ranks(self.tokenizer, self.group)
        self.checkpoint = TokenizerCheckpoint(config, len(images))
        if mesh is not None:  # otherwise some ranks could resume and others start from step 0
            check_same_files(mesh, {"the unfinished training of tokenizers.visual.path": str(self.checkpoint.path)})
        restored = self.checkpoint.load(self.tokenizer, self.optimizer)
        self.first_step = 0 if restored is None else restored.step
        self.broken_records = BrokenRecords(
            config.data.max_broken_records,
            HostGroup() if mesh is None else mesh.data_host,
            {} if restored is None else restored.broken_records,
        )
        self.met: dict[str, str] = {}
        """Broken images found by this rank and not yet shared."""
        self.center = self._mean_features() if restored is None else restored.center.to(device)
        if restored is not None:
            report(f"visual tokenizer: resuming after step {self.first_step} from {self.checkpoint.path}")

    def do_steps(self) -> None:
        """Does the remaining steps, with progress lines and checkpoints."""
        visual, log_interval = self.visual, self.config.training.log_interval
        progress = _Progress(visual, self.first_step, self.report)
        counter = CodeCounter(visual.codebook_size, self.device)
        for step, pixels in enumerate(self._batches(self.first_step, visual.training_steps), start=self.first_step):
            if step == visual.continuous_steps:
                self._start_codebook()
            if self.mesh is not None:
                self.mesh.activity.begin("training the visual tokenizer", step + 1)
            losses, codes = self._update(step, pixels)
            if codes is not None:
                counter.add(codes)
            done = step + 1
            if done == 1 or done % log_interval == 0 or done == visual.training_steps:
                usage = None if codes is None else counter.usage(self.mesh)
                self._share_broken_records(f"by step {done}")
                progress.show(done, self._mean_over_ranks(losses), usage, self.broken_records.total)
                counter = CodeCounter(visual.codebook_size, self.device)
            if done % visual.save_interval == 0 and done < visual.training_steps and _is_main(self.mesh):
                known = self.broken_records.state()
                self.checkpoint.save(done, self.tokenizer, self.optimizer, self.center, known)

    def finish(self) -> CodeUsage:
        """Writes the tokenizer's file, counts its codes over training images and returns their usage."""
        if _is_main(self.mesh):
            save_visual_tokenizer(self.visual.path, self.tokenizer)
            save_recipe(self.visual.path, visual_recipe(self.config))
            self.checkpoint.remove()
        num_batches = -(-min(_USAGE_IMAGES, len(self.images)) // self.visual.batch_size)
        codes = (self.tokenizer.encode(pixels) for pixels in self._batches(0, num_batches))
        usage = measure_code_usage(codes, self.visual.codebook_size, self.mesh)
        if _is_main(self.mesh):
            usage.warn_if_low("over the training images")
        self.report(f"visual tokenizer: wrote {self.visual.path}; {usage} over the training images")
        return usage

    def _update(self, step: int, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Does one optimizer step; returns this rank's loss and cosine, (2,), and its codes, if any."""
        for group in self.optimizer.param_groups:
            group["lr"] = tokenizer_learning_rate(self.visual, step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.visual.bf16):
            quantized = step >= self.visual.continuous_steps
            reconstruction, commitment, codes = self.network(pixels, self.group, quantized=quantized)
            target = self.teacher(pixels) - self.center
        cosine = F.cosine_similarity(reconstruction.float(), target, dim=-1).mean()
        loss = 1 - cosine + self.visual.commitment_weight * commitment
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return torch.stack([loss.detach(), cosine.detach()]), codes

    def _batches(self, first_step: int, last_step: int) -> Iterator[Tensor]:
        """Yields this rank's part of the batches of steps [first_step, last_step), on its device."""
        rank, size = (0, 1) if self.mesh is None else (self.mesh.data_parallel_rank, self.mesh.data_parallel_size)
        share = self.visual.batch_size // size
        starts = (step * self.visual.batch_size + rank * share for step in range(first_step, last_step))
        data = self.config.data
        limits = WaitLimits(seconds=data.timeout_seconds, where=f"rank {rank} (host {socket.gethostname()})")
        batches = (range(start, start + share) for start in starts)
        loader = build_view_loader(self.images, batches, data.num_workers, limits)
        for view in loader:
            self.met |= view.broken_records
            yield view.pixels.to(self.device, non_blocking=True)

    def _share_broken_records(self, where: str) -> None:
        """Shares broken images with all ranks and reports new ones; all ranks call it.

        Raises:
            ConfigError: on all ranks, if there are more than `data.max_broken_records`.
        """
        new = self.broken_records.unknown(self.met)
        self.met = {}
        lines = self.broken_records.add(new, f"{where} of the visual tokenizer's training")
        limit = self.config.data.max_broken_records
        for line in format_new_records(lines, self.broken_records.total, limit):
            self.report(f"visual tokenizer: {line}")

    def _start_batches(self) -> Iterator[Tensor]:
        """Yields enough batches to initialise the codebook: one, or more if a batch is small."""
        patches = self.visual.batch_size * self.visual.grid_size**2
        return self._batches(0, -(-_START_VECTORS_PER_CODE * self.visual.codebook_size // patches))

    def _mean_features(self) -> Tensor:
        """Returns the mean of the teacher's features, (E,), which targets leave out.

        White backgrounds dominate the mean; with it, a constant reconstruction would reach most of the cosine.
        """
        means = torch.stack([self.teacher(pixels).mean(dim=(0, 1)) for pixels in self._start_batches()])
        return self._mean_over_ranks(means.mean(dim=0))

    @torch.no_grad()
    def _start_codebook(self) -> None:
        vectors = [self.tokenizer.project(pixels).flatten(0, 1) for pixels in self._start_batches()]
        self.tokenizer.quantize.start(torch.stack(vectors), self.group)

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        return values if self.mesh is None else self.mesh.sum_over_data(values) / self.mesh.data_parallel_size


def build_tokenizer_optimizer(tokenizer: VisualTokenizer) -> AdamW:
    """Builds AdamW without decay on biases, norms, positions and class tokens."""
    named = list(tokenizer.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))]
    others = [p for name, p in named if p.ndim <= 1 or name.endswith(("pos_embed", "cls_token"))]
    weight_decay = tokenizer.config.weight_decay
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=tokenizer.config.learning_rate, betas=_ADAM_BETAS)


def _join_ranks(tokenizer: VisualTokenizer, group: dist.ProcessGroup | None) -> nn.Module:
    """Wraps the tokenizer so that gradients are averaged over the ranks.

    Buffers are not synchronised: the codebook is updated by sums over all ranks, so it is equal on all ranks.
    """
    if group is None or dist.get_world_size(group) == 1:
        return tokenizer
    return DistributedDataParallel(tokenizer, process_group=group, forward_sync_buffers=False)


def _is_main(mesh: Mesh | None) -> bool:
    return mesh is None or mesh.is_main


def _silent(line: str) -> None:
    """Reports nothing, because only the main rank reports."""


def _check_images(images: Views, image_size: int) -> None:
    if len(images) == 0:
        raise ConfigError("tokenizers.visual: there are no images to train on; see data.images and data.pairs 'train'.")
    shape, wanted = tuple(images.read(0).pixels.shape), (3, image_size, image_size)
    if shape != wanted:
        raise ConfigError(
            f"tokenizers.visual: training images have shape {shape}, image_size={image_size} needs {wanted}. "
            f"Build the views with tokenizers.visual.image_size."
        )


def _check_batch_size(batch_size: int, mesh: Mesh | None) -> None:
    size = 1 if mesh is None else mesh.data_parallel_size
    if batch_size % size:
        below, above = batch_size // size * size, -(-batch_size // size) * size
        raise ConfigError(
            f"tokenizers.visual: batch_size={batch_size} does not divide over {size} ranks. Use "
            f"{f'{below} or {above}' if below else above}, or another number of ranks."
        )


class _Progress:
    """Reports one line of figures per logged step."""

    def __init__(self, visual: VisualTokenizerConfig, first_step: int, report: Callable[[str], None]) -> None:
        self._visual, self._first_step, self._report = visual, first_step, report
        self._start = time.perf_counter()
        self._warned = False

    def show(self, step: int, losses: Tensor, usage: CodeUsage | None, broken_records: int) -> None:
        """Reports the figures of a step.

        Args:
            step: number of steps done.
            losses: loss and cosine, (2,).
            usage: usage of codes since the last report; None without codes.
            broken_records: number of broken records found so far.
        """
        broken = f"  broken records {broken_records}" if broken_records else ""
        loss, cosine = losses.tolist()
        steps, seconds = step - self._first_step, time.perf_counter() - self._start
        left = seconds / steps * (self._visual.training_steps - step)
        self._report(
            f"visual tokenizer: step {step}/{self._visual.training_steps}  loss {loss:.4f}  cosine {cosine:.4f}  "
            f"{usage or 'no codes yet'}  {steps * self._visual.batch_size / seconds:.0f} images/s{broken}  "
            f"{left:.0f} s left"
        )
        if usage is not None and usage.is_low and not self._warned:
            self._warned = True
            usage.warn_if_low(f"at step {step}")

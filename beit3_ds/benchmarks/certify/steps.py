"""Times training steps of this project, torchscale and plain PyTorch: for the base model, and for the giant model with
fewer layers.

All steps use the same samples, gradient clipping and torch's fused AdamW with float32 weights. On a GPU, this project's
model computes in bfloat16, and the other models run under bfloat16 autocast.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.certify.ceilings import measured_flops, published
from beit3_ds.benchmarks.certify.device_kind import kind_of
from beit3_ds.benchmarks.certify.operators import keep_choices, using
from beit3_ds.benchmarks.certify.plain_model import PlainModel
from beit3_ds.benchmarks.certify.recorder import Recorder
from beit3_ds.benchmarks.peak_memory import peak_bytes
from beit3_ds.benchmarks.step.batches import build_batch, step_config
from beit3_ds.benchmarks.step.products import needed_flops
from beit3_ds.benchmarks.step.reference import PaddedStream, ReferenceModel, unpack_streams
from beit3_ds.benchmarks.turns import device_of_turns
from beit3_ds.config import RunConfig
from beit3_ds.kernels.ops.measured_op import Backend
from beit3_ds.model.flops import layer_flops, work_of
from beit3_ds.tasks.pretraining.heads import head_flops
from beit3_ds.tasks.pretraining.model import PretrainingModel

Step = Callable[[], Tensor]
"""Function that trains one step and returns the loss as a tensor on the device."""

_STEPS = {"cuda": 10, "cpu": 1, "dry": 1}
_REPEATS = {"cuda": 3, "cpu": 1, "dry": 1}
_MAX_NORM = 3.0


class Model(NamedTuple):
    """Describes a model whose training step is timed: model size, number of layers, and samples per step."""

    name: str
    """Name of the model in the report."""
    size: str
    """Model size, a key of `MODEL_SIZES`."""
    num_layers: int
    """Number of layers to build."""
    samples: int
    """Number of images per step, equal to the number of pairs and to the number of texts."""
    has_small_vocabularies: bool = False
    """Whether to use small vocabularies, which save time on a CPU."""

    def config(self) -> RunConfig:
        """Returns the run config of the model."""
        run = step_config(self.size, self.samples, num_layers=self.num_layers)
        if not self.has_small_vocabularies:
            return run
        return replace(run, backbone=replace(run.model, text_vocab_size=2010, visual_vocab_size=512))


def models(device: torch.device) -> tuple[Model, ...]:
    """Returns the models to time.

    On a GPU: the whole base model, and the giant model with 8 of its 40 layers. On a CPU: the tiny model with 2 layers.
    In a dry run, in which a CPU emulates a GPU: the base model and the giant model, each with 2 layers.
    """
    if kind_of(device) == "dry":
        base = Model("base", "base", 2, 1, has_small_vocabularies=True)
        return base, base._replace(name="giant, 8 layers", size="giant")
    if device.type != "cuda":
        return (Model("tiny, 2 layers", "tiny", 2, 1, has_small_vocabularies=True),)
    return Model("base", "base", 12, 32), Model("giant, 8 layers", "giant", 8, 32)


def measure(recorder: Recorder) -> None:
    """Times the training step of each model with each implementation, and records each result.

    Implementations that take long to compile come last.
    """
    device = device_of_turns()
    peak = published(device)
    ceiling = peak.half_flops if peak else None
    run = partial(_measure, device=device, measured=measured_flops(recorder), data_sheet=ceiling)
    backends: tuple[Backend | None, ...] = (None,) if kind_of(device) == "cpu" else ("auto", "triton", "library")
    for model in models(device):
        for backend in backends:
            item = f"{model.name}: beit3_ds{', ' + backend if backend else ''}"
            recorder.measure(item, partial(run, model, partial(our_step, backend=backend)))
            keep_choices(recorder, device)
        recorder.measure(f"{model.name}: torchscale", partial(run, model, _torchscale_step))
    for model in models(device):
        compiles = device.type == "cuda"
        item = f"{model.name}: SDPA{' + torch.compile' if compiles else ''}"
        recorder.measure(item, partial(run, model, partial(_plain_step, compiles=compiles)))


def our_step(config: RunConfig, batch: PackedBatch, backend: Backend | None = None) -> Step:
    """Returns this project's training step without DeepSpeed.

    On a GPU, the weights are bfloat16, and the optimizer updates float32 master weights.
    """
    device = batch.token_ids.device
    with device:
        model = PretrainingModel(config.model)
    _initialize(model)
    model.to(torch.float32 if kind_of(device) == "cpu" else torch.bfloat16)
    counts = torch.tensor(batch.term_counts, device=device)
    factors = 1 / counts.clamp(min=1)
    weights: list[Tensor] = list(model.parameters())
    masters: list[Tensor] = [weight.detach().float().clone().requires_grad_() for weight in weights]
    optimizer = _optimizer(masters)

    def step() -> Tensor:
        with using(backend):
            total: Tensor = model(batch, factors).total
            total.backward()
        for master in masters:
            master.grad = torch.empty_like(master)
        torch._foreach_copy_(
            [m.grad for m in masters if m.grad is not None], [w.grad for w in weights if w.grad is not None]
        )
        _update(masters, optimizer)
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        model.zero_grad()
        return total.detach()

    return step


def timed_batch(config: RunConfig, device: torch.device) -> PackedBatch:
    """Returns the batch on which all implementations train, with tensors on `device`."""
    return build_batch(config, 0).to(device)


def _torchscale_step(config: RunConfig, batch: PackedBatch) -> Step:
    return _padded_step(ReferenceModel(config), config, batch)


def _plain_step(config: RunConfig, batch: PackedBatch, compiles: bool) -> Step:
    with batch.token_ids.device:
        model = PlainModel(config.model, compiles)
    return _padded_step(model, config, batch)


def _padded_step(model: nn.Module, config: RunConfig, batch: PackedBatch) -> Step:
    device = batch.token_ids.device
    model.to(device)
    _initialize(model)
    streams: Sequence[PaddedStream] = unpack_streams(batch, config.data.pair_text_length, config.data.text_length)
    optimizer = _optimizer(list(model.parameters()))

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind_of(device) != "cpu"):
            loss = torch.stack([term for stream in streams for term in model(stream)]).sum()
        loss.backward()
        _update(list(model.parameters()), optimizer)
        return loss.detach()

    return step


def _initialize(model: nn.Module) -> None:
    """Fills the parameters with random values directly on the device, which takes only milliseconds."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float("norm" in name and "weight" in name))


def _optimizer(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)


def _update(parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(parameters, _MAX_NORM, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


def _measure(
    model: Model,
    build: Callable[[RunConfig, PackedBatch], Step],
    device: torch.device,
    measured: float | None,
    data_sheet: float | None,
) -> dict[str, Any]:
    """Trains until the step is compiled and warm, then times groups of further steps.

    The host waits for the GPU only before and after each group.
    """
    config = model.config()
    batch = timed_batch(config, device)
    kind = kind_of(device)
    if kind != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    step = build(config, batch)
    first = float(step())
    seconds_to_first = time.perf_counter() - begin
    for _ in range(0 if kind == "cpu" else 3):
        step()
    times = [_time(step, _STEPS[kind], device) for _ in range(_REPEATS[kind])]
    ms = statistics.median(total for total, _ in times)
    defined, needed = _flops(config, batch), needed_flops(config.model, build_batch(config, 0))
    shares: dict[str, float] = {}
    for name, ceiling in (("of_data_sheet", data_sheet), ("of_measured", measured)):
        if ceiling and kind != "cpu":
            shares |= {f"mfu_defined_{name}": defined / ms / ceiling * 1e3}
            shares |= {f"mfu_needed_{name}": needed / ms / ceiling * 1e3}
    peak = peak_bytes() if kind == "cpu" else torch.cuda.max_memory_allocated()
    return {
        "rows": batch.num_rows,
        "ms": ms,
        "min_ms": min(total for total, _ in times),
        "max_ms": max(total for total, _ in times),
        "host_ms": statistics.median(host for _, host in times),
        "tokens_per_s": batch.num_rows / ms * 1e3,
        "samples_per_s": 3 * model.samples / ms * 1e3,
        "tflops_defined": defined / ms / 1e9,
        **shares,
        "peak_gib": peak / 2**30,
        "seconds_to_first_step": seconds_to_first,
        "first_loss": first,
        "passed": bool(torch.isfinite(torch.tensor(first))),
    }


def _time(step: Step, number: int, device: torch.device) -> tuple[float, float]:
    """Measures the mean time of a step over `number` runs.

    Returns:
        The whole time of a step, and Python's time to launch the step's kernels, both in milliseconds.
    """
    if kind_of(device) != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        step()
    host = time.perf_counter() - start
    if kind_of(device) != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number * 1e3, host / number * 1e3


def _flops(config: RunConfig, batch: PackedBatch) -> float:
    """Returns the FLOPs of a step's matrix products.

    Assumes that every block computes all rows, and that no gradient with respect to the pixels is computed.
    """
    embeddings, *rest = layer_flops(config.model, work_of(batch, head_flops(config.model, batch.term_counts)))
    return 2 * embeddings + 3 * sum(rest)

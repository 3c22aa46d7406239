"""Runs three AdamW steps under any layout, and compares them with plain PyTorch in one process."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import RunConfig, build_run_config
from beit3_ds.parallel import Mesh, is_split, logical_part
from tests.batches import merge_batches, random_batch
from tests.run_config import small_run_mapping

if TYPE_CHECKING:
    from beit3_ds.pipeline.schedule import Schedule

NUM_STEPS = 3  # the second step uses buffers left by the first
CLIP = 0.05  # below the gradient norm, so that a wrong norm moves the weights
LEARNING_RATE = 1e-3  # the paper's
NUM_LAYERS = 6  # with embeddings and heads as many as 4 stages with 2 model chunks each
SHALLOW = 3  # blocks where fewer stages divide them; steps take half as long

# The samples of a step: an image, a pair, a text, and a mix; twice.
MIXES = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)] * 2

Deal = Sequence[Sequence[Sequence[int]]]
"""Sample numbers of one step: a list per data-parallel rank, of a list per micro-batch."""

MODELS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sub-LN": {"sub_layernorm": True},
    "tied": {"tie_word_embeddings": True},
    "decoupled": {"layout": "decoupled", "num_vision_language_layers": 0, "sub_layernorm": True},
}


def config_for(
    zero_stage: int,
    model: str = "paper",
    checkpointing: str = "none",
    *,
    num_layers: int = NUM_LAYERS,
    bf16: bool = False,
    training: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | None = None,
    **parallel: Any,
) -> RunConfig:
    """Returns a configuration of small blocks with stochastic depth.

    Unless the model is "decoupled", the top block has a vision-language expert.
    """
    sizes = {"num_layers": num_layers, "num_attention_heads": 4, "drop_path_rate": 0.2}
    mapping = copy.deepcopy(small_run_mapping(zero_stage, accumulation=4, **sizes, **MODELS[model]))
    mapping["gradient_clipping"] = CLIP
    if bf16:
        mapping["bf16"] = {"enabled": True}
    mapping["beit3_ds"]["parallel"] = parallel
    mapping["beit3_ds"]["training"] |= {"learning_rate": LEARNING_RATE, "activation_checkpointing": checkpointing}
    mapping["beit3_ds"]["training"] |= training or {}
    mapping |= deepspeed or {}
    return build_run_config(mapping)


def build_samples(config: RunConfig, step: int) -> list[PackedBatch]:
    """Returns the samples of one step, each as a batch; the last step masks captions as the captioning task does."""
    batches = [random_batch(config.model, *mix, seed=10 * step + i, drop_path=True) for i, mix in enumerate(MIXES)]
    return [dataclasses.replace(batch, causal_captions=step == NUM_STEPS - 1) for batch in batches]


def measure_steps(
    config: RunConfig, mesh: Mesh, deals: Sequence[Deal], num_steps: int = NUM_STEPS
) -> dict[str, Tensor]:
    """Runs `num_steps` steps, cycling through `deals`; returns losses, norms, and the stage's gradients and weights."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import apply_update, build_schedule

    schedule = build_schedule(build_task(config), mesh)
    engine = schedule.engine
    named = dict(engine.module.named_parameters())
    result: dict[str, Tensor] = {}
    for step in range(num_steps):
        losses = accumulate_step(schedule, config, mesh, deals[step % len(deals)], step)
        gradients = {name: safe_get_full_grad(p) for name, p in named.items()}
        result |= logical_tensors(gradients, named, mesh, f"gradient {step}")
        result[f"loss {step}"] = losses
        result[f"norm {step}"] = torch.tensor(apply_update(engine, mesh))
        full = safe_get_full_fp32_param if config.deepspeed["zero_optimization"]["stage"] else torch.clone
        result |= logical_tensors({name: full(p) for name, p in named.items()}, named, mesh, f"weight {step}")
    engine.destroy()
    return result


def accumulate_step(schedule: "Schedule", config: RunConfig, mesh: Mesh, deal: Deal, step: int) -> Tensor:
    """Runs forward and backward passes of one step; returns the mean loss of each term over all ranks, shape (4,)."""
    from beit3_ds.tasks import build_task
    from beit3_ds.training.broken_records import BrokenRecords, StepCounts
    from beit3_ds.training.loss import build_loss_factors

    samples = build_samples(config, step)
    nothing = random_batch(config.model, 0, 0, 0, drop_path=True)
    batches = tuple(
        merge_batches([samples[i] for i in numbers]) if numbers else nothing
        for numbers in deal[mesh.data_parallel_rank]
    )
    counts, _ = StepCounts(BrokenRecords(0, mesh.data_host), mesh).agree(StepBatch(step=step, micro_batches=batches))
    factors = build_loss_factors(counts, build_task(config).terms, mesh.data_parallel_size)
    sums = schedule.accumulate_gradients(batches, factors, lambda batch: batch)
    return mesh.pipeline.host.broadcast(mesh.data_host.sum(sums), src=-1) / counts


def logical_tensors(
    parts: Mapping[str, Tensor], parameters: Mapping[str, torch.nn.Parameter], mesh: Mesh, kind: str
) -> dict[str, Tensor]:
    """Returns the logical tensors of this rank.

    Checks that copies of a tensor on tensor-parallel ranks are equal bit for bit.
    """
    own = {name: logical_part(parameters[name], part).detach().clone() for name, part in parts.items()}
    # As one vector per rank: hundreds of small messages would take as long as the step. Ranks' shapes may differ.
    joined = torch.cat([tensor.flatten() for tensor in own.values()])
    peers = mesh.tensor.host.gather((joined, [list(tensor.shape) for tensor in own.values()]))
    gathered = [dict(zip(own, _split(*peer), strict=True)) for peer in peers]
    whole: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        pieces = [peer[name] for peer in gathered]
        split = is_split(parameter)
        whole[f"{kind} {name}"] = torch.cat(pieces, dim=parameter.parallel_split.dim) if split else own[name]  # type: ignore[attr-defined]
        if not split:
            # ZeRO cuts the flat weights at the same positions on all ranks. Otherwise AdamW would update a weight in
            # its vectorised part on one rank and its scalar part on another, which round differently.
            assert all(torch.equal(piece, own[name]) for piece in pieces), (
                f"{kind} {name}: tensor-parallel ranks disagree"
            )
    return whole


def _split(joined: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Splits a vector into tensors of the given shapes."""
    parts = joined.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


class Reference:
    """Runs the steps of `measure_steps` on all samples at once, without DeepSpeed.

    Uses autograd, clip_grad_norm_ and AdamW. Computes each model once and saves the result in a folder that ranks read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, models: Iterable[str]) -> "Reference":
        """Computes the steps of the models that the folder lacks; call it before ranks start."""
        for model, num_layers in itertools.product(models, (NUM_LAYERS, SHALLOW)):
            path = self._path(model, num_layers)
            if not path.exists():
                save_file(_plain_steps(model, num_layers), path)
        return self

    def load(self, model: str, num_layers: int = NUM_LAYERS) -> dict[str, Tensor]:
        """Returns losses, norms, gradients and weights, named as in `measure_steps`."""
        return load_steps(self._path(model, num_layers))

    def ratios(self, found: Mapping[str, Tensor], model: str, num_layers: int = NUM_LAYERS) -> dict[str, float]:
        """Returns the error of each tensor as a fraction of the allowed error; see `error_ratios`."""
        return error_ratios(found, self.load(model, num_layers))

    def _path(self, model: str, num_layers: int) -> Path:
        return self._folder / f"{model}, {num_layers} layers.safetensors"


def error_ratios(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the error of each tensor as a fraction of the allowed error.

    The error |a - b| may be 1e-5 |b| + 1e-7 |all| in the 2-norm, where |all| is the norm of all tensors of a kind.
    """
    kinds = {name.rsplit(" ", 1)[0] for name in found}
    norms = {kind: norm_of_all(expected, kind) for kind in kinds}
    return {name: _ratio(name, value, expected[name], norms[name.rsplit(" ", 1)[0]]) for name, value in found.items()}


@cache
def load_steps(path: Path) -> dict[str, Tensor]:
    """Loads the saved tensors of some steps; each process reads a file once."""
    return load_file(path)


def _ratio(name: str, value: Tensor, expected: Tensor, norm: float) -> float:
    difference = value.float() - expected
    if is_key_bias(name):
        # Zero in theory; rounding errors have random signs, which Adam turns into full steps.
        limit = 1e-6 if name.startswith("gradient") else NUM_STEPS * LEARNING_RATE
        return float(difference.abs().max()) / limit
    limit = 1e-5 * float(expected.norm()) + 1e-7 * norm
    return float(difference.norm()) / limit if difference.isfinite().all() else float("inf")


def norm_of_all(tensors: Mapping[str, Tensor], kind: str) -> float:
    """Returns the joint 2-norm of all tensors whose names start with `kind`."""
    return float(torch.stack([value.float().norm() for name, value in tensors.items() if name.startswith(kind)]).norm())


def is_key_bias(name: str) -> bool:
    """Returns whether a tensor is a key bias or the gradient of a key bias, which is 0 except for rounding.

    Softmax ignores a term that is equal for all keys.
    """
    return "k_proj.bias" in name


def check(ratios: Sequence[Mapping[str, float]], names: Iterable[str], where: str) -> float:
    """Checks that errors are in bounds and each layer is on some rank; returns the worst ratio without key biases."""
    assert set().union(*ratios) == set(names), f"{where}: the stages together hold every layer"
    # `not <=` rather than `>`: a NaN must fail.
    wrong = {name: ratio for rank in ratios for name, ratio in rank.items() if not ratio <= 1}
    assert not wrong, (
        f"{where}: {len(wrong)} tensors exceed their bounds so many times: {dict(list(wrong.items())[:8])}"
    )
    return max(ratio for rank in ratios for name, ratio in rank.items() if not is_key_bias(name))


def _plain_steps(model_name: str, num_layers: int) -> dict[str, Tensor]:
    from beit3_ds.training.optimizer import build_optimizer

    config = config_for(0, model_name, num_layers=num_layers)
    return plain_steps(config, lambda model: build_optimizer(model, config))


def plain_steps(
    config: RunConfig, build_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Runs `NUM_STEPS` steps with autograd, clip_grad_norm_ and an optimizer.

    Returns:
        The tensors that `measure_steps` returns.
    """
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import build_model
    from beit3_ds.training.learning_rate import learning_rate
    from beit3_ds.training.loss import build_loss_factors

    model = build_model(build_task(config))
    optimizer = build_optimizer(model)
    assert learning_rate(config.training, 0) > 0
    result: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        batches = build_samples(config, step)
        counts = torch.tensor([b.term_counts for b in batches]).sum(0)
        factors = build_loss_factors(counts, build_task(config).terms, 1)
        optimizer.zero_grad()
        outputs = [model(batch, factors) for batch in batches]
        torch.stack([output.total for output in outputs]).sum().backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
        result |= {f"gradient {step} {name}": gradient for name, gradient in gradients.items()}
        result[f"loss {step}"] = torch.stack([output.sums for output in outputs]).sum(0) / counts
        result[f"norm {step}"] = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        result |= {f"weight {step} {name}": p.detach().clone() for name, p in model.named_parameters()}
    return result

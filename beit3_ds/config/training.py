"""Steps, optimizer, schedule, and what a run writes."""

from dataclasses import dataclass, field
from typing import Literal

from beit3_ds.config.numbers import (
    Count,
    Decay,
    Epsilon,
    FinalLearningRate,
    LearningRate,
    Positive,
    Seed,
    Steps,
    Weight,
    WeightDecay,
)
from beit3_ds.config.strict import ConfigError, PathString

ActivationCheckpointing = Literal["none", "full"]
"""What the backward pass recomputes beyond what ops make again anyway: nothing, or whole blocks."""

Kernels = Literal["triton", "cuda"]
"""In which language the kernels are that GPUs run, where there are two of one kernel."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors of the four loss terms; the paper names none, so each is 1."""

    image_mim: Weight = 1.0
    """Masked patches of images."""
    text_mlm: Weight = 1.0
    """Masked tokens of texts."""
    pair_mim: Weight = 1.0
    """Masked patches of pairs."""
    pair_mlm: Weight = 1.0
    """Masked tokens of captions."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimizer's recipe (paper section 2.3) and the run's bookkeeping."""

    output_dir: PathString
    """Where checkpoints, logs, plot and predictions go."""
    total_steps: Steps
    """Optimizer steps of the run (paper: 1M); the cosine schedule ends here."""
    warmup_steps: Count
    """Steps of linear warmup (paper: 10k)."""
    learning_rate: LearningRate
    """Peak learning rate (paper: 1e-3)."""
    min_learning_rate: FinalLearningRate = 0.0
    """Learning rate of the last step, an absolute value; the paper does not say where its cosine ends."""
    weight_decay: WeightDecay = 0.05
    """Decoupled weight decay of matrices; biases, norms, positions, CLS and mask token have none (paper: 0.05)."""
    optimizer: Literal["adamw", "apex_fused_adam"] = "adamw"
    """`adamw`: torch's fused AdamW. `apex_fused_adam`: FusedAdam of NVIDIA's apex in its AdamW mode, for GPUs; apex is
    built from its source, for the package of that name on PyPI is another one. Checkpoints of both are the same."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.98)
    """AdamW's betas (paper)."""
    adam_epsilon: Epsilon = 1e-6
    """AdamW's epsilon (paper)."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Factors of the four terms."""
    init_from: PathString | None = None
    """Exported or imported weights (`beit3 export`, `beit3 import`) that a new run begins with, under any layout of
    ranks. Image size, text length, vision-language experts and a decoupled layout may differ from the file's
    (docs/checkpoints.md). A run that has a checkpoint resumes from it instead. None: initial values drawn from the
    seed."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What the backward pass recomputes instead of keeping it. `none`: what is cheap to make again, GELUs, sub-LNs and
    the scores of attention (the selective recomputation of Korthikanti et al., 2022, arXiv:2205.05198), which the ops
    never keep. `full`: every block, for a third more compute."""
    fp32_residual_connection: bool = True
    """Whether the residual stream, to which every branch adds, stays float32 in a bf16 run (Megatron's option of the
    same name; no effect in an fp32 run). Products and their inputs stay bf16. On 40 narrow layers (BENCHMARKS.md) the
    gradients' error against float64 was about a third of the error with a bf16 stream. The stream takes twice the
    memory and bandwidth; `beit3 check` prints both. Autocast, which the reference trains with, also keeps the stream
    float32. Checkpoints do not depend on this setting."""
    kernels: Kernels = "triton"
    """In which language the kernels are that a GPU runs. `triton` needs no build. `cuda`: CUDA C++ where there is such
    a kernel (the forward passes of attention and of the FFN's up projection), in half precision; the rest stays
    Triton's. docs/kernels_cuda.md says how to build it; neither was ever timed on a GPU."""
    seed: Seed = 1
    """Seeds initial values, data order, masks, augmentation and stochastic depth."""
    validation_seed: Seed = 1
    """Seeds the choice of validation samples and their masks. It is apart from `seed`, so that the validation losses of
    runs with different seeds are comparable."""
    log_interval: Positive = 10
    """Steps between progress lines."""
    eval_interval: Positive = 1000
    """Steps between validation evaluations; one also opens and closes the run."""
    eval_samples: Positive = 1024
    """Most validation samples per stream that are evaluated, spread over its sources by their sizes."""
    save_interval: Positive = 1000
    """Steps between checkpoints; one also closes the run."""
    keep_checkpoints: Positive = 3
    """Whole checkpoints that are kept; older ones are deleted once a newer one is whole."""

    max_skipped_steps: Positive = 5
    """Steps in a row that are skipped because a loss or a gradient is NaN or infinite, before the run stops, with a
    checkpoint. One is the fault of a sample or of a device; in so many with other samples, training has diverged."""

    def __post_init__(self) -> None:
        if self.warmup_steps > self.total_steps:
            raise ConfigError(
                f"training: warmup_steps={self.warmup_steps} exceeds total_steps={self.total_steps}, so the learning "
                "rate would never reach its peak. A shorter run needs a shorter warmup: add --set "
                f"training.warmup_steps={self.total_steps // 10}, or change both in the file."
            )
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"training: min_learning_rate={self.min_learning_rate:g} exceeds learning_rate={self.learning_rate:g}, "
                "from which the schedule falls to it. Lower the first or raise the second."
            )

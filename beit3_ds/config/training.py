"""Defines the "training" section: steps, optimizer, schedule, and what a run writes."""

from dataclasses import dataclass
from typing import Literal

from beit3_ds.config.numbers import (
    Count,
    Decay,
    Epsilon,
    FinalLearningRate,
    LayerDecay,
    LearningRate,
    LearningRateScale,
    Positive,
    Seed,
    Steps,
    WeightDecay,
)
from beit3_ds.config.strict import ConfigError, PathString

ActivationCheckpointing = Literal["none", "full"]
"""Whether the backward pass recomputes whole blocks (`TrainingConfig.activation_checkpointing`)."""

LearningRateDecay = Literal["cosine", "poly"]
"""Curve of the learning rate after the warmup (`TrainingConfig.learning_rate_decay`)."""

KernelBackend = Literal["auto", "triton", "library", "cuda"]
"""How operators are implemented on a GPU (`TrainingConfig.kernel_backend`)."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Configures the optimizer's recipe (paper, section 2.3) and the run's logs and checkpoints."""

    output_dir: PathString
    """Folder for checkpoints, logs, the plot and the predictions."""
    total_steps: Steps
    """Number of optimizer steps of the run (paper: 1M); the schedule ends at the last step. E epochs of a stream
    are E x samples / `samples_per_step` steps. A run prints its epochs at its start."""
    warmup_steps: Count
    """Number of steps of linear warmup (paper: 10k)."""
    learning_rate: LearningRate
    """Peak learning rate (paper: 1e-3)."""
    min_learning_rate: FinalLearningRate = 0.0
    """Learning rate of the last step; the paper does not give the end of its cosine schedule."""
    learning_rate_decay: LearningRateDecay = "cosine"
    """Curve from the peak to `min_learning_rate` after the warmup: half a cosine (paper), or `poly`, a straight line:
    the polynomial of power 1 with which ViT-Adapter and BEiT train segmentation."""
    layer_decay: LayerDecay = 1.0
    """Factor of the learning rate per layer below the last one, for fine-tuning (the reference: 0.65 to 0.85). The
    embeddings are layer 0, and block i is layer i + 1. The last layer, final norm and head, has the full learning
    rate."""
    head_learning_rate_scale: LearningRateScale = 1.0
    """Factor of the learning rate of a task's head, which is new in fine-tuning (the reference: 20 for VQAv2)."""
    frozen: tuple[str, ...] = ()
    """Patterns of names of parameters that training does not change, such as `embeddings.*` or `blocks.[0-3].*`. Frozen
    parameters do not count in the gradient norm. Their optimizer state is kept, so freezing saves no memory.
    """
    weight_decay: WeightDecay = 0.05
    """Decoupled weight decay of matrices (paper: 0.05); biases, norms, positions, CLS and mask token have none."""
    optimizer: Literal["adamw", "apex_fused_adam"] = "adamw"
    """Implementation of AdamW: `adamw` is torch's fused AdamW, and `apex_fused_adam` is FusedAdam of NVIDIA's apex, for
    GPUs. Their checkpoints are interchangeable. Build apex from its source, because PyPI's `apex` is an unrelated
    package."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Betas of AdamW (the paper's values)."""
    adam_epsilon: Epsilon = 1e-6
    """Epsilon of AdamW (the paper's value)."""
    init_from: PathString | None = None
    """File of exported or imported weights (`beit3 export`, `beit3 import`) with which a new run starts. The model may
    differ in image size, text length, vision-language experts and a decoupled layout (docs/checkpoints.md). A run that
    has a checkpoint resumes from it instead. None draws initial values from the seed."""
    ema_decay: Decay | None = None
    """Decay of an exponential moving average of the weights, such as 0.9999. It averages over about 1 / (1 - decay)
    updates, which should be far below `total_steps`. Evaluations use the average, and `beit3 export --ema` writes it.
    It takes 4 bytes per element. None keeps no average."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Which activations the backward pass recomputes. `none` recomputes only GELUs, sub-LayerNorms and attention
    scores, which are cheap (selective recomputation; Korthikanti et al., 2022, arXiv:2205.05198). `full` recomputes
    every block, which takes a third more compute."""
    fp32_residual_connection: bool = True
    """Whether a bf16 run keeps the residual stream in float32, as Megatron's option of the same name; no effect in
    fp32. Matrix products stay bf16. On 40 narrow layers (BENCHMARKS.md) the gradients had about a third of the error.
    The stream takes twice the memory and bandwidth; `beit3 check` prints both. Checkpoints do not depend on this
    setting."""
    kernel_backend: KernelBackend = "auto"
    """How operators are implemented on a GPU. `auto` times all implementations at the first use of each size and keeps
    the fastest in a file. `triton` uses our Triton kernels, `library` PyTorch's operations with cuBLAS and cuDNN, and
    `cuda` our CUDA C++ kernels where they exist (docs/kernels_cuda.md) and Triton elsewhere. No effect on a CPU."""
    seed: Seed = 1
    """Seed of initial values, data order, masks, augmentation and stochastic depth."""
    validation_seed: Seed = 1
    """Seed that chooses the validation samples and their masks; runs with different `seed` then have comparable
    losses."""
    log_interval: Positive = 10
    """Number of steps between progress lines."""
    eval_interval: Positive = 1000
    """Number of steps between evaluations; a run also evaluates at its start and at its end."""
    eval_samples: Positive | None = None
    """Maximum number of validation samples to evaluate per stream, divided over its sources by their sizes. None takes
    1024 samples for a validation loss, and all samples for a task's metrics."""
    eval_batch_size: Positive = 16
    """Number of samples per stream in a batch of a whole split. The metrics do not depend on the number of ranks."""
    save_interval: Positive = 1000
    """Number of steps between checkpoints; a run also saves one at its end."""
    keep_checkpoints: Positive = 3
    """Number of complete checkpoints to keep; older ones are deleted when a newer one is complete."""

    best_metric: str | None = None
    """Metric by which the best checkpoint is chosen: the task's headline, such as `accuracy`, or a term of its loss.
    After a better evaluation than all before, the run saves a checkpoint that `keep_checkpoints` neither counts nor
    deletes. None keeps only the newest checkpoints."""
    early_stop_evaluations: Positive | None = None
    """Number of consecutive evaluations without a better `best_metric` after which the run ends; None never ends it
    early."""
    max_skipped_steps: Positive = 5
    """Number of consecutive steps with a NaN or infinite loss or gradient after which the run saves a checkpoint and
    stops. Such steps are skipped. Several in a row mean that training has diverged."""

    @property
    def loss_samples(self) -> int:
        """Returns the maximum number of samples per stream in a validation loss."""
        return 1024 if self.eval_samples is None else self.eval_samples

    def __post_init__(self) -> None:
        if self.early_stop_evaluations is not None and self.best_metric is None:
            raise ConfigError(
                f"training: early_stop_evaluations={self.early_stop_evaluations} needs best_metric, which has to "
                "improve. Name it, or leave early_stop_evaluations out."
            )
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

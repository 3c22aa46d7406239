"""Defines the section "training": the optimizer, the schedule, and a run's evaluations, logs and checkpoints."""

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
"""Values of `TrainingConfig.activation_checkpointing`."""

LearningRateDecay = Literal["cosine", "poly"]
"""Values of `TrainingConfig.learning_rate_decay`."""

KernelBackend = Literal["auto", "triton", "library", "cuda"]
"""Values of `TrainingConfig.kernel_backend`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Configures the optimizer and its schedule (paper, section 2.3), evaluations, logs and checkpoints."""

    output_dir: PathString
    """Folder for checkpoints, logs, plots and predictions."""
    total_steps: Steps
    """Number of optimizer steps of the run (paper: 1M), and length of the learning-rate schedule. For E epochs of a
    stream, set E x (number of samples) / `samples_per_step`. A run prints its number of epochs at the start."""
    warmup_steps: Count
    """Number of steps over which the learning rate rises linearly to its peak (paper: 10k)."""
    learning_rate: LearningRate
    """Peak learning rate (paper: 1e-3)."""
    min_learning_rate: FinalLearningRate = 0.0
    """Learning rate at the last step. The paper gives no value."""
    learning_rate_decay: LearningRateDecay = "cosine"
    """Curve of the learning rate after the warmup, from the peak to `min_learning_rate`. `cosine` is half a cosine, as
    in the paper. `poly` is a straight line (polynomial of power 1), as in the segmentation training of ViT-Adapter and
    BEiT."""
    layer_decay: LayerDecay = 1.0
    """Ratio of a layer's learning rate to that of the next layer, for fine-tuning. Microsoft's BEiT-3 code uses 0.65 to
    0.85. The embeddings are layer 0, and block i is layer i + 1. The final norm and the head form the last layer, which
    has the full learning rate."""
    head_learning_rate_scale: LearningRateScale = 1.0
    """Factor on the learning rate of the task's head, which fine-tuning trains from scratch (the reference: 20 for
    VQAv2)."""
    frozen: tuple[str, ...] = ()
    """Name patterns of the parameters that are not trained, such as `embeddings.*` or `blocks.[0-3].*`. Frozen
    parameters are not part of the gradient norm. Freezing saves no memory, because the optimizer keeps the state of
    frozen parameters."""
    weight_decay: WeightDecay = 0.05
    """Decoupled weight decay of weight matrices (paper: 0.05). Biases, norms, positions, CLS and the mask token do not
    decay."""
    optimizer: Literal["adamw", "apex_fused_adam"] = "adamw"
    """Implementation of AdamW: `adamw` is PyTorch's fused AdamW, and `apex_fused_adam` is FusedAdam of NVIDIA Apex, for
    GPUs only. Each implementation loads checkpoints of the other. Build Apex from source: PyPI's `apex` is an unrelated
    package."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.98)
    """AdamW's two betas (the paper's values)."""
    adam_epsilon: Epsilon = 1e-6
    """AdamW's epsilon (the paper's value)."""
    init_from: PathString | None = None
    """Weights file from which a new run starts, written by `beit3 export` or `beit3 import`. The model may differ from
    the file in image size, text length, vision-language experts and attention layout (docs/checkpoints.md). If the run
    has a checkpoint, it resumes from the checkpoint instead. With None, initial values are drawn from the seed."""
    ema_decay: Decay | None = None
    """Decay of an exponential moving average of the weights, such as 0.9999. The average covers about 1 / (1 - decay)
    steps, which should be far fewer than `total_steps`. Evaluations use the average, and `beit3 export --ema` writes
    the average. The average takes 4 bytes per parameter. With null, no average is kept."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Which activations the backward pass recomputes. With `none`, no block is checkpointed; only GELUs, sub-LayerNorms
    and attention scores are recomputed, because they are cheap. This is the selective recomputation of Korthikanti et
    al., 2022 (arXiv:2205.05198). With `full`, every block is recomputed, which takes a third more compute."""
    fp32_residual_connection: bool = True
    """Whether a bf16 run keeps the residual stream in float32, like Megatron's option of the same name. Matrix products
    stay in bf16. In a measurement with 40 narrow layers (BENCHMARKS.md), the option cut the gradient error to about a
    third. The residual stream takes twice the memory and bandwidth; `beit3 check` prints the memory with and without
    the option. Checkpoints do not depend on the option. No effect in fp32."""
    kernel_backend: KernelBackend = "auto"
    """How operators are implemented on a GPU. `auto` times all implementations at the first use of each size, and
    records the fastest in a file. `triton` uses this project's Triton kernels, and `library` uses PyTorch's operations.
    `cuda` uses this project's CUDA C++ kernels where they exist (docs/kernels_cuda.md), and Triton kernels elsewhere.
    No effect on a CPU."""
    seed: Seed = 1
    """Seed of initial values, sample order, masks, augmentation and stochastic depth."""
    validation_seed: Seed = 1
    """Seed that selects the validation samples and their masks. Runs with the same value have comparable validation
    losses."""
    log_interval: Positive = 10
    """Number of steps between progress lines."""
    eval_interval: Positive = 1000
    """Number of steps between evaluations. A run also evaluates at its start and end."""
    eval_samples: Positive | None = None
    """Maximum number of validation samples per stream (images, pairs or texts). Each source of a stream supplies a
    share in proportion to its size. None uses 1024 samples for a validation loss, and all samples for a task's metrics.
    """
    eval_batch_size: Positive = 16
    """Number of samples per stream (images, pairs or texts) in an evaluation batch. Metrics do not depend on this
    number."""
    save_interval: Positive = 1000
    """Number of steps between checkpoints. A run also saves a checkpoint at its end."""
    keep_checkpoints: Positive = 3
    """Number of complete checkpoints to keep. Older ones are deleted once a newer one is complete."""

    best_metric: str | None = None
    """Metric that selects the best checkpoint: the task's main metric, such as `accuracy`, or the name of a loss term.
    When an evaluation improves the metric, the run saves a checkpoint. The latest of these checkpoints is kept even if
    `keep_checkpoints` newer ones exist. None saves no best checkpoint."""
    early_stop_evaluations: Positive | None = None
    """Number of consecutive evaluations without an improvement of `best_metric` after which the run ends. None disables
    early stopping."""
    max_skipped_steps: Positive = 5
    """Number of consecutive skipped steps after which the run stops. A step is skipped if its loss or gradient is NaN
    or infinite. Several skipped steps in a row mean that training has diverged. The newest checkpoint then contains the
    last weights before the skipped steps."""

    @property
    def loss_samples(self) -> int:
        """Returns the maximum number of samples per stream (images, pairs or texts) for a validation loss."""
        return 1024 if self.eval_samples is None else self.eval_samples

    def __post_init__(self) -> None:
        if self.early_stop_evaluations is not None and self.best_metric is None:
            raise ConfigError(
                f"training: early_stop_evaluations={self.early_stop_evaluations} needs best_metric, the metric that "
                "must improve. Set best_metric, or leave out early_stop_evaluations."
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
                "but the rate must decrease. Lower min_learning_rate or raise learning_rate."
            )

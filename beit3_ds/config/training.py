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
"""Recomputation in the backward pass in addition to the ops' own: nothing, or whole blocks."""

Kernels = Literal["triton", "cuda"]
"""GPU kernel backend; `cuda` applies only where a CUDA C++ kernel exists."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Configures the optimizer's recipe (paper, section 2.3) and the run's logs and checkpoints."""

    output_dir: PathString
    """Folder for checkpoints, logs, the plot and the predictions."""
    total_steps: Steps
    """Optimizer steps of the run (paper: 1M); the cosine schedule ends at the last. E epochs of a stream are
    E x samples / `samples_per_step` steps; a start prints the epochs of `total_steps`."""
    warmup_steps: Count
    """Steps of linear warmup (paper: 10k)."""
    learning_rate: LearningRate
    """Peak learning rate (paper: 1e-3)."""
    min_learning_rate: FinalLearningRate = 0.0
    """Learning rate of the last step, an absolute value; the paper does not give the end of its cosine."""
    layer_decay: LayerDecay = 1.0
    """Factor of the learning rate per layer below the head, for fine-tuning (the reference: 0.65 to 0.85). Embeddings
    are layer 0, block i is layer i + 1, final norm and head are the last layer, which has the whole rate."""
    head_learning_rate_scale: LearningRateScale = 1.0
    """Factor of the learning rate of a task's head, whose parameters are new in fine-tuning (the reference: 20 for
    VQAv2)."""
    frozen: tuple[str, ...] = ()
    """Patterns of logical parameter names that training does not change, e.g. `embeddings.*` or `blocks.[0-3].*`; `*`
    stands for any characters. Frozen parameters do not count in the gradient norm. They stay in the optimizer's
    memory, so freezing saves no memory."""
    weight_decay: WeightDecay = 0.05
    """Decoupled weight decay of matrices (paper: 0.05); biases, norms, positions, CLS and mask token have none."""
    optimizer: Literal["adamw", "apex_fused_adam"] = "adamw"
    """Implementation of AdamW; checkpoints of both are the same. `adamw` is torch's fused AdamW. `apex_fused_adam` is
    FusedAdam of NVIDIA's apex in its AdamW mode, for GPUs. Build apex from its source: PyPI's `apex` is an unrelated
    package."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.98)
    """AdamW's betas (paper)."""
    adam_epsilon: Epsilon = 1e-6
    """AdamW's epsilon (paper)."""
    init_from: PathString | None = None
    """Exported or imported weights (`beit3 export`, `beit3 import`) with which a new run starts, under any layout of
    ranks. Image size, text length, vision-language experts and a decoupled layout may differ from the file's
    (docs/checkpoints.md). A run with a checkpoint resumes from it instead. None draws initial values from the seed."""
    ema_decay: Decay | None = None
    """Decay of an exponential moving average of the weights, such as 0.9999; 1 / (1 - decay) is the number of updates
    that it averages over, which should be far below `total_steps`. Evaluations and the final report then use the
    average instead of the weights; `beit3 export --ema` writes it. It takes 4 bytes per element. None keeps no
    average."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations that the backward pass recomputes. `none` recomputes what is cheap and the ops never keep: GELUs,
    sub-LNs and attention scores (selective recomputation; Korthikanti et al., 2022, arXiv:2205.05198). `full`
    recomputes every block, for a third more compute."""
    fp32_residual_connection: bool = True
    """Keeps the residual stream in float32 in a bf16 run (Megatron's option of the same name; no effect in an fp32
    run). Products and their inputs stay bf16. On 40 narrow layers (BENCHMARKS.md) the gradients' error against float64
    was about a third of that with a bf16 stream. The stream takes twice the memory and bandwidth; `beit3 check` prints
    both. The reference trains under autocast, which also keeps the stream in float32. Checkpoints do not depend on
    this setting."""
    kernels: Kernels = "triton"
    """GPU kernel backend. `triton` needs no build. `cuda` uses CUDA C++ in half precision where such a kernel exists
    (the forward passes of attention and of the FFN's up projection) and Triton elsewhere. docs/kernels_cuda.md
    explains the build; docs/kernels.md says what ran on which device."""
    seed: Seed = 1
    """Seed of initial values, data order, masks, augmentation and stochastic depth."""
    validation_seed: Seed = 1
    """Seed of the choice of validation samples and of their masks. It differs from `seed`, so that validation losses
    of runs with different seeds are comparable."""
    log_interval: Positive = 10
    """Steps between progress lines."""
    eval_interval: Positive = 1000
    """Steps between evaluations on the validation samples; the run also starts and ends with one."""
    eval_samples: Positive | None = None
    """Maximum number of validation samples evaluated per stream, divided over its sources by their sizes. None takes
    1024 for a validation loss, whose batches stay in memory, and all samples for the metrics of a task."""
    eval_batch_size: Positive = 16
    """Samples of each stream in a batch when a task evaluates a whole split. It does not depend on the ranks, so
    metrics are the same on any number of them."""
    save_interval: Positive = 1000
    """Steps between checkpoints; the run also ends with one."""
    keep_checkpoints: Positive = 3
    """Complete checkpoints to keep; older ones are deleted once a newer one is complete."""

    best_metric: str | None = None
    """Metric of the evaluations by which the best checkpoint is chosen: the task's headline, such as `accuracy`, or a
    term of its loss. An evaluation that is better than all before saves a checkpoint, which `keep_checkpoints` neither
    counts nor deletes. None keeps the newest checkpoints only."""
    early_stop_evaluations: Positive | None = None
    """Evaluations in a row without a better `best_metric` after which the run ends as finished, with its report. None
    trains all `total_steps`."""
    max_skipped_steps: Positive = 5
    """Consecutive steps skipped for a NaN or infinite loss or gradient after which the run stops, with a checkpoint. A
    single one comes from a sample or a device; this many with other samples mean that training has diverged."""

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

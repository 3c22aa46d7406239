"""One JSON file is one run: DeepSpeed's keys beside a "beit3_ds" section."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.config.data import DataConfig, TokenizersConfig
from beit3_ds.config.deepspeed import OWN_SECTION, check_deepspeed_keys, engine_config
from beit3_ds.config.model import ModelConfig, load_model_section
from beit3_ds.config.parallel import ParallelConfig
from beit3_ds.config.step_shares import MicroBatchSize, StepShares
from beit3_ds.config.strict import ConfigError, check_known_keys, check_range, load_section
from beit3_ds.config.training import TrainingConfig

SECTIONS = ("model", "data", "tokenizers", "training", "parallel")
"""The sections inside "beit3_ds"; the last may be left out."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    model: ModelConfig
    data: DataConfig
    tokenizers: TokenizersConfig
    training: TrainingConfig
    parallel: ParallelConfig
    gradient_accumulation_steps: int
    """Micro-batches of one rank in one optimizer step."""
    deepspeed: Mapping[str, Any]
    """DeepSpeed's own keys, verbatim."""

    @property
    def samples_per_step(self) -> int:
        """Samples of all streams in one optimizer step."""
        return sum(stream.samples_per_step for stream in self.data.streams().values())

    def step_shares(self, data_parallel_size: int) -> StepShares:
        """Divides every stream's samples per step over ranks and micro-batches, as evenly as possible.

        Raises:
            ConfigError: if there are fewer samples than ranks, or DeepSpeed's own batch sizes say something else.
        """
        shares = StepShares(
            samples=MicroBatchSize(*(stream.samples_per_step for stream in self.data.streams().values())),
            num_ranks=data_parallel_size,
            num_micro_batches=self.gradient_accumulation_steps,
        )
        shares.check(self.deepspeed)
        return shares

    def check_engine(self) -> None:
        """Refuses options of DeepSpeed that give wrong gradients in this layout, or state that cannot be saved.

        Raises:
            ConfigError: with what to leave out.
        """
        zero = self.deepspeed.get("zero_optimization", {})
        for section in ("offload_optimizer", "offload_param"):
            if zero.get(section, {}).get("device") == "nvme":
                raise ConfigError(
                    f'zero_optimization.{section}.device="nvme" keeps state in files of DeepSpeed\'s own, which '
                    'checkpoints do not read. Use "cpu", or more ranks.'
                )
        if not zero.get("compute_grad_norm", True):
            raise ConfigError(
                "zero_optimization.compute_grad_norm=false leaves out the gradients' norm, by which steps with a NaN "
                "are known and skipped. Leave it out."
            )
        if self.training.optimizer == "apex_fused_adam":
            if zero.get("offload_optimizer", {}).get("device", "none") != "none":
                raise ConfigError(
                    'training.optimizer="apex_fused_adam" runs on GPUs only, but zero_optimization.offload_optimizer '
                    "updates on the host. Leave one of the two out."
                )
            if zero.get("stage", 0) == 3:
                raise ConfigError(
                    'training.optimizer="apex_fused_adam" counts updates by parameter group, but '
                    "zero_optimization.stage=3 updates a group in pieces, each of which would count. Use stage 1 or 2."
                )
            if self.deepspeed.get("bf16", {}).get("enabled") and not zero.get("stage", 0):
                raise ConfigError(
                    'training.optimizer="apex_fused_adam" with bf16 and without ZeRO makes DeepSpeed keep state in a '
                    "form that checkpoints do not read. Use zero_optimization.stage 1 or 2."
                )
        if self.parallel.virtual_pipeline_parallel_size == 1:
            return
        if zero.get("stage", 0) == 1 and zero.get("overlap_comm"):
            raise ConfigError(
                "zero_optimization.overlap_comm=true under stage 1 reduces the gradients of a step's last backward "
                "pass alone, which with parallel.virtual_pipeline_parallel_size > 1 goes through some of a stage's "
                "layers. Leave it out, or use ZeRO stage 0, 2 or 3."
            )
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            raise ConfigError(
                "zero_optimization.offload_optimizer takes the gradients of a step's last backward pass alone, which "
                "with parallel.virtual_pipeline_parallel_size > 1 goes through some of a stage's layers. Leave one of "
                "the two out."
            )

    def engine_config(self, data_parallel_size: int) -> dict[str, Any]:
        """The dictionary that the DeepSpeed engine is built from; its own accumulation is 1."""
        return engine_config(self.deepspeed, self.samples_per_step, data_parallel_size)


def load_run_config(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a run's JSON file.

    Args:
        path: the file.
        changes: `KEY=VALUE` each, applied in order before anything is checked. KEY is a path of dots from the top of
            the file or inside "beit3_ds", e.g. `gradient_accumulation_steps=4` or `training.total_steps=100`; VALUE is
            JSON, or a string that needs no quotes.

    Raises:
        ConfigError: for an unreadable file, invalid JSON, an unknown key at any level or values that do not fit.
    """
    path = Path(path)
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file (looked in {Path.cwd()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}.") from None
    try:
        for change in changes:
            _apply_change(mapping, change)
        return build_run_config(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_run_config(mapping: Any) -> RunConfig:
    """Builds and checks a run's configuration from the parsed JSON object.

    Raises:
        ConfigError: as `load_run_config`.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"expected a JSON object at the top, got {type(mapping).__name__}.")
    check_deepspeed_keys(mapping, "top level")
    if OWN_SECTION not in mapping:
        raise ConfigError(f"the section '{OWN_SECTION}' is missing; see ds_configs/quickstart_cpu.json for an example.")
    own = mapping[OWN_SECTION]
    if not isinstance(own, Mapping):
        raise ConfigError(f"{OWN_SECTION}: expected a JSON object, got {type(own).__name__}.")
    check_known_keys(own, SECTIONS, OWN_SECTION)
    for section in SECTIONS:
        if section not in own and section != "parallel":
            raise ConfigError(f"{OWN_SECTION}: the section '{section}' is missing.")
    accumulation = mapping.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or isinstance(accumulation, bool):
        raise ConfigError(f"gradient_accumulation_steps: expected int, got {accumulation!r}.")
    check_range("gradient_accumulation_steps", accumulation, 1)
    config = RunConfig(
        model=load_model_section(own["model"], f"{OWN_SECTION}.model"),
        data=load_section(DataConfig, own["data"], f"{OWN_SECTION}.data"),
        tokenizers=load_section(TokenizersConfig, own["tokenizers"], f"{OWN_SECTION}.tokenizers"),
        training=load_section(TrainingConfig, own["training"], f"{OWN_SECTION}.training"),
        parallel=load_section(ParallelConfig, own.get("parallel", {}), f"{OWN_SECTION}.parallel"),
        gradient_accumulation_steps=accumulation,
        deepspeed={key: value for key, value in mapping.items() if key != OWN_SECTION},
    )
    _check_sections_agree(config)
    return config


def _check_sections_agree(config: RunConfig) -> None:
    model, data, visual = config.model, config.data, config.tokenizers.visual
    if config.samples_per_step == 0:
        raise ConfigError("data: samples_per_step is 0 for all three streams; nothing would be trained.")
    if visual.grid_size != model.grid_size:
        raise ConfigError(
            f"tokenizers.visual: {visual.image_size} px / patch {visual.patch_size} gives a grid of "
            f"{visual.grid_size}, but the model's {model.image_size} px / patch {model.patch_size} gives "
            f"a grid of {model.grid_size}. Set tokenizers.visual.image_size to {model.grid_size * visual.patch_size}."
        )
    if visual.codebook_size != model.visual_vocab_size:
        raise ConfigError(
            f"model.visual_vocab_size={model.visual_vocab_size} must equal tokenizers.visual.codebook_size="
            f"{visual.codebook_size}."
        )
    if config.tokenizers.text.vocab_size + 2 > model.text_vocab_size:
        raise ConfigError(
            f"model.text_vocab_size={model.text_vocab_size} is too small for tokenizers.text.vocab_size="
            f"{config.tokenizers.text.vocab_size}: <pad> and <mask> add 2 ids. Use at least "
            f"{config.tokenizers.text.vocab_size + 2}."
        )
    longest = max(data.text_length, data.pair_text_length)
    if longest > model.max_text_length:
        raise ConfigError(
            f"model.max_text_length={model.max_text_length} is shorter than data.text_length={data.text_length} or "
            f"data.pair_text_length={data.pair_text_length}. Raise it to {longest}."
        )


def _apply_change(mapping: Any, change: str) -> None:
    key, separator, text = change.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"--set {change}: expected KEY=VALUE, e.g. training.total_steps=100.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    keys = key.split(".")
    *sections, last = [OWN_SECTION, *keys] if keys[0] in SECTIONS else keys
    for section in sections:
        if not isinstance(mapping, dict) or not isinstance(mapping.setdefault(section, {}), dict):
            raise ConfigError(f"--set {change}: '{section}' is no section of the file.")
        mapping = mapping[section]
    mapping[last] = value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"the key '{twice}' stands twice in one object.")
    return mapping

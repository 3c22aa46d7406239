"""Loads a run's JSON file: DeepSpeed's keys at the top level, and this project's section "beit3_ds"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.config.data import DataConfig, TokenizersConfig
from beit3_ds.config.deepspeed import OWN_SECTION, engine_config, read_deepspeed_keys
from beit3_ds.config.deepspeed_keys import DEEPSPEED_KEYS
from beit3_ds.config.deepspeed_options import DeepSpeedOptions
from beit3_ds.config.deepspeed_rules import check_deepspeed_rules
from beit3_ds.config.model import ModelConfig, load_model_section
from beit3_ds.config.parallel import ParallelConfig
from beit3_ds.config.step_shares import SampleCounts, StepShares
from beit3_ds.config.strict import (
    ConfigError,
    check_known_keys,
    check_plain,
    expand_home,
    is_plain_text,
    load_section,
    nearest,
    parse_json,
    parse_json_or_text,
    show,
)
from beit3_ds.config.task import TaskConfig, load_task_section
from beit3_ds.config.training import TrainingConfig

SECTIONS = ("model", "data", "tokenizers", "training", "parallel", "task")
"""Valid sections inside "beit3_ds"."""
_OPTIONAL_SECTIONS = ("model", "parallel", "task")

_MAX_BYTES = 1 << 23
_MAX_SHOWN = 200
"""Maximum number of characters of a `--set` argument that an error message quotes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Holds the complete configuration of a run."""

    backbone: ModelConfig | None
    """The section "model"; None if the run trains another model than BEiT-3, such as a visual tokenizer."""
    data: DataConfig
    tokenizers: TokenizersConfig
    training: TrainingConfig
    parallel: ParallelConfig
    task: TaskConfig
    gradient_accumulation_steps: int
    """Number of micro-batches per rank and optimizer step."""
    deepspeed: Mapping[str, Any]
    """DeepSpeed's part of the configuration file, after all checks."""

    @property
    def model(self) -> ModelConfig:
        """Returns the section "model", the configuration of BEiT-3.

        Raises:
            ConfigError: if the file has no section "model".
        """
        if self.backbone is None:
            raise ConfigError(f"{OWN_SECTION}: the section 'model' is missing: the task {self.task.name} needs it.")
        return self.backbone

    @property
    def options(self) -> DeepSpeedOptions:
        """Returns the run's DeepSpeed options, such as the ZeRO stage and the data types."""
        return DeepSpeedOptions(self.deepspeed)

    @property
    def samples_per_step(self) -> int:
        """Returns the number of samples per optimizer step, summed over images, pairs and texts."""
        return sum(stream.samples_per_step for stream in self.data.streams().values())

    def step_shares(self, data_parallel_size: int) -> StepShares:
        """Returns how each stream's samples per step are divided over data-parallel ranks and micro-batches.

        Raises:
            ConfigError: if a step has fewer samples than there are data-parallel ranks.
        """
        shares = StepShares(
            samples=SampleCounts(*(stream.samples_per_step for stream in self.data.streams().values())),
            num_ranks=data_parallel_size,
            num_micro_batches=self.gradient_accumulation_steps,
        )
        shares.check_ranks()
        return shares

    def check_engine(self) -> None:
        """Checks that the DeepSpeed options work with each other, with the layout and with the optimizer.

        Raises:
            ConfigError: if options do not work together; the message names the option to leave out.
        """
        check_deepspeed_rules(self.options, self.training, self.parallel)

    def engine_config(self, data_parallel_size: int) -> dict[str, Any]:
        """Returns the configuration for `deepspeed.initialize` (`beit3_ds.config.deepspeed.engine_config`)."""
        return engine_config(self.deepspeed, self.samples_per_step, data_parallel_size, self.training.output_dir)


def load_run_config(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Loads and checks a run's JSON file.

    Args:
        path: path of the file.
        changes: strings KEY=VALUE, applied in order before the checks. KEY is a dotted path from the top of the file or
            from the section "beit3_ds", such as "training.total_steps". VALUE is JSON, or a string without quotes.

    Raises:
        ConfigError: if the file cannot be read or is not valid JSON, if a key is unknown, or if values are invalid or
            contradict each other.
    """
    path = Path(expand_home(str(path), "the path of the config file"))
    try:
        with path.open("rb") as file:  # may be a pipe
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        text = data.decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file (looked in {Path.cwd()}).") from None
    except (OSError, ValueError) as error:  # ValueError: a path with NUL, or bytes that are not UTF-8
        raise ConfigError(f"{path}: cannot be read: {error}.") from None
    mapping = parse_json(text, str(path))
    try:
        for change in changes:
            _apply_change(mapping, change)
        return build_run_config(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_run_config(mapping: Any) -> RunConfig:
    """Builds and checks a run's configuration from the parsed JSON object.

    Raises:
        ConfigError: if a key is unknown, if a value is invalid, or if values contradict each other.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"expected a JSON object at the top, got {show(mapping)}.")
    for section in SECTIONS:
        if section in mapping:
            raise ConfigError(f"the section '{section}' is at the top of the file; move it into '{OWN_SECTION}'.")
    deepspeed = read_deepspeed_keys(mapping, "top level")
    if OWN_SECTION not in mapping:
        raise ConfigError(f"the section '{OWN_SECTION}' is missing; see ds_configs/quickstart_cpu.json for an example.")
    own = mapping[OWN_SECTION]
    if not isinstance(own, Mapping):
        raise ConfigError(f"{OWN_SECTION}: expected a JSON object, got {show(own)}.")
    check_known_keys(own, SECTIONS, OWN_SECTION)
    for section in SECTIONS:
        if section not in own and section not in _OPTIONAL_SECTIONS:
            raise ConfigError(f"{OWN_SECTION}: the section '{section}' is missing.")
    check_plain(own, OWN_SECTION)
    config = RunConfig(
        backbone=load_model_section(own["model"], f"{OWN_SECTION}.model") if "model" in own else None,
        data=load_section(DataConfig, own["data"], f"{OWN_SECTION}.data"),
        tokenizers=load_section(TokenizersConfig, own["tokenizers"], f"{OWN_SECTION}.tokenizers"),
        training=load_section(TrainingConfig, own["training"], f"{OWN_SECTION}.training"),
        parallel=load_section(ParallelConfig, own.get("parallel", {}), f"{OWN_SECTION}.parallel"),
        task=load_task_section(own.get("task", {}), f"{OWN_SECTION}.task"),
        gradient_accumulation_steps=deepspeed.get("gradient_accumulation_steps", 1),
        deepspeed=deepspeed,
    )
    _check_sections_agree(config)
    config.check_engine()
    return config


def _check_sections_agree(config: RunConfig) -> None:
    data = config.data
    if config.samples_per_step == 0:
        raise ConfigError("data: samples_per_step is 0 for all three streams; nothing would be trained.")
    if data.has_texts and config.backbone is None:
        raise ConfigError(
            f"{OWN_SECTION}: the section 'model' is missing; a run with pairs or texts needs it. A run of the task "
            "visual_tokenizer lists all its images, also those of pairs, in data.images."
        )
    if data.has_texts:
        _check_text_tokenizer(config)


def _check_text_tokenizer(config: RunConfig) -> None:
    model, data = config.model, config.data
    if not config.tokenizers.text.path:
        raise ConfigError(
            "tokenizers.text.path is missing: texts and pairs need a text tokenizer. Name its file, or leave both "
            "streams out (samples_per_step 0, no validation) for a run on images alone."
        )
    if config.tokenizers.text.vocab_size + 2 > model.text_vocab_size:
        raise ConfigError(
            f"model.text_vocab_size={model.text_vocab_size} is too small for tokenizers.text.vocab_size="
            f"{config.tokenizers.text.vocab_size}: <pad> and <mask> add 2 ids. Use at least "
            f"{config.tokenizers.text.vocab_size + 2}."
        )
    lengths = {"texts": data.text_length, "pairs": data.pair_text_length}
    longest = max(lengths[name] for name, stream in data.streams().items() if name in lengths and stream.is_used)
    if longest > model.max_text_length:
        raise ConfigError(
            f"model.max_text_length={model.max_text_length} is shorter than data.text_length={data.text_length} or "
            f"data.pair_text_length={data.pair_text_length}. Raise it to {longest}."
        )


_SECTION_CLASSES: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "tokenizers": TokenizersConfig,
    "training": TrainingConfig,
    "parallel": ParallelConfig,
    "task": TaskConfig,
}


def _hint_for_key(name: str, known: Sequence[str]) -> str:
    """Finds the key that the user of `--set` probably meant; returns a hint for the error message.

    The search covers misspelt keys and keys that lack their section. If it finds no key, the hint lists the sections.

    Args:
        name: first part of the unknown dotted key.
        known: valid top-level keys and names of sections.
    """
    inside = {key: f"{section}.{key}" for section, cls in _SECTION_CLASSES.items() for key in cls.__annotations__}
    near = inside.get(name) or nearest(name, known)
    if near is None and (key := nearest(name, inside)):
        near = inside[key]
    return f"Did you mean '{near}'?" if near else f"Sections: {', '.join(SECTIONS)}; or a key of DeepSpeed's."


def _apply_change(mapping: Any, change: str) -> None:
    key, separator, text = change.partition("=")
    keys = key.split(".")
    where = f"--set {(change if is_plain_text(change) else repr(change))[:_MAX_SHOWN]}"
    if not separator or not all(keys) or not is_plain_text(key):
        raise ConfigError(f"{where}: expected KEY=VALUE, e.g. training.total_steps=100.")
    if not isinstance(mapping, dict):
        raise ConfigError(f"expected a JSON object at the top, got {show(mapping)}.")
    known = [*SECTIONS, OWN_SECTION, *DEEPSPEED_KEYS]
    if keys[0] not in known:
        raise ConfigError(f"{where}: unknown key '{keys[0][:_MAX_SHOWN]}'. {_hint_for_key(keys[0], known)}")
    value = parse_json_or_text(text, where)
    *sections, last = [OWN_SECTION, *keys] if keys[0] in SECTIONS else keys
    for section in sections:
        if not isinstance(mapping, dict) or not isinstance(mapping.setdefault(section, {}), dict):
            raise ConfigError(f"{where}: '{section}' is no section of the file.")
        mapping = mapping[section]
    mapping[last] = value
